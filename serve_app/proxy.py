"""Middleware for Serve's HTTP proxy: the task of a request as Serve's multiplexed model, and error replies as JSON.

Serve prefers replicas that hold the model which a header names, see :mod:`serve_app.held_tasks`. Serve answers in plain text if no replica answers, because a replica died during the request or none is ready. Serve
loads :func:`middlewares` if ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it. Classification has no side effects,
so clients may retry every request that the proxy could not deliver.
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve_app.proxy.middlewares"
TASK_PATH = re.compile(r"/(?:tasks/([^/]+)/predict|v2/models/([^/]+)/infer)$")
_MODEL_HEADER = b"serve_multiplexed_model_id"
_KINDS = {404: "not_found", 408: "timeout", 429: "overloaded"}


class NamedTasks:
    """Tells Serve the task that the path of a request names."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (match := TASK_PATH.search(scope["path"])):
            task = match[1] or match[2]
            scope = {**scope, "headers": [*scope["headers"], (_MODEL_HEADER, task.encode())]}
        await self.app(scope, receive, send)


class JsonFailures:
    """Turns the proxy's plain-text errors, and missing replies, into ``{"error", "error_type"}``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused: int | None = None
        text = bytearray()
        started = False

        async def translate(message: Message) -> None:
            nonlocal refused, started
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                # The application's own errors are JSON, so this one comes from the proxy.
                if message["status"] >= 400 and not kind.startswith("application/json"):
                    refused = message["status"]
                    return
                started = True
            elif refused is not None:
                text.extend(message.get("body", b""))
                return
            await send(message)

        try:
            await self.app(scope, receive, translate)
        finally:
            if not started:
                for message in _reply(refused or 503, text.decode(errors="replace")):
                    await send(message)


def _reply(status: int, text: str) -> list[Message]:
    status = 503 if status >= 500 else status
    message = text if status < 500 and text else "no replica answered this request; retry it"
    body = json.dumps({"error": message, "error_type": _KINDS.get(status, "unhealthy")}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def middlewares() -> list[Middleware]:
    """Return the middleware that Serve wraps around its proxy."""
    return [Middleware(JsonFailures), Middleware(NamedTasks)]
