"""In Serve's HTTP proxy: what the proxy itself answers, as JSON too.

Serve speaks plain text where no replica has answered: one died with the request, or none is there yet. It loads
:func:`middlewares` where ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it. Classification changes nothing, so
whatever the proxy could not deliver may be asked again.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve_app.proxy.middlewares"
_KINDS = {404: "not_found", 408: "timeout", 429: "overloaded"}


class JsonFailures:
    """Turns the proxy's plain refusals, and no reply at all, into ``{"error", "error_type"}``."""

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
                # The application's own refusals are JSON, so this one is the proxy's.
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
    message = text if status < 500 and text else "no replica answered this request; ask again"
    body = json.dumps({"error": message, "error_type": _KINDS.get(status, "unhealthy")}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(JsonFailures)]
