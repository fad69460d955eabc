"""The HTTP interface of one replica, as an ASGI application. Independent of Ray."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import revmux
from serve_app import errors as failures
from serve_app import examples
from serve_app.auth import BearerAuth
from serve_app.metrics import ReplicaMetrics
from serve_app.open_inference import InferRequest
from serve_app.operations import STATIC, operations_routes
from serve_app.predict import open_inference_routes, predict_routes
from serve_app.protocol import PredictRequest
from serve_app.service import Service

DESCRIPTION = """Text classification by frozen models, with several requests per forward pass.

The API is compatible with text-embeddings-inference (`/predict`), `huggingface_hub.InferenceClient`, and the Open
Inference Protocol (`/v2`). The headers of each reply describe how it was computed: `x-revmux-width`, `x-revmux-method`,
`x-revmux-stage`, `x-revmux-group`, `x-revmux-fallback`, and times in milliseconds. Every error is `{"error", "error_type"}`.
"""


def create_app(service: Service) -> FastAPI:
    """Build the HTTP application of a service."""
    # FastAPIOffline serves Swagger's files itself, so the pages need no network.
    app = FastAPIOffline(
        title="RevMUX", version=revmux.__version__, description=DESCRIPTION, redoc_url=None, redirect_slashes=False
    )
    failures.install(app)
    for routes in (predict_routes, operations_routes, open_inference_routes):
        app.include_router(routes(service))
    app.mount("/static", StaticFiles(directory=STATIC))
    if service.tokens:
        app.add_middleware(BearerAuth, tokens=service.tokens)
    app.add_middleware(Measured, metrics=service.metrics)
    _describe(app, bool(service.tokens))
    return app


def _describe(app: FastAPI, needs_token: bool) -> None:
    """Add what the endpoints do not declare to the OpenAPI page: the schemas of request bodies, and the token."""
    schema = app.openapi()
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(examples.definitions(PredictRequest, InferRequest))
    if needs_token:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"bearer": []}]


class Measured:
    """Middleware that counts replies by route and status, and measures their time.

    Args:
        app: the wrapped application.
        metrics: records the counts and times.
    """

    def __init__(self, app: ASGIApp, metrics: ReplicaMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = _route(scope)
            self.metrics.replies.labels(route, str(status or "dropped")).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - started)


def _route(scope: dict[str, Any] | Scope) -> str:
    """Return the route's path pattern. Raw paths would create an unlimited number of metric labels."""
    return getattr(scope.get("route"), "path", None) or "other"
