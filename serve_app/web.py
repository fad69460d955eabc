"""The HTTP interface of one replica, as an ASGI application. Independent of Ray."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp, Receive, Scope, Send

import revmux
from serve_app import errors as failures
from serve_app import examples
from serve_app.auth import BearerAuth
from serve_app.backend import Backend
from serve_app.classify import ClassifyRequest
from serve_app.fast_path import FastPath
from serve_app.metrics import ReplicaMetrics
from serve_app.open_inference import InferRequest
from serve_app.operations import STATIC, operations_routes
from serve_app.predict import Endpoints, classify_routes, open_inference_routes, predict_routes
from serve_app.protocol import PredictRequest

DESCRIPTION = """Text classification by frozen models, with several requests per forward pass.

The API is compatible with text-embeddings-inference (`/predict`), `huggingface_hub.InferenceClient`, vLLM (`/classify`,
`/v1/models`), and the Open Inference Protocol (`/v2`). The headers of each reply describe how it was computed: `x-revmux-width`, `x-revmux-method`,
`x-revmux-stage`, `x-revmux-group`, `x-revmux-fallback`, and times in milliseconds. Every error is `{"error", "error_type"}`.
"""


class HttpApplication:
    """The HTTP application: the fast path for classifications, and FastAPI for all else.

    Args:
        fast: answers requests for classifications.
        api: describes all endpoints, and answers the other requests.
    """

    def __init__(self, fast: FastPath, api: FastAPI) -> None:
        self.fast = fast
        self.api = api
        self.routes = api.routes  # Serve names requests by their routes
        self.router = api.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if not await self.fast.answers(scope, receive, send):
            await self.api(scope, receive, send)


def create_app(backend: Backend) -> HttpApplication:
    """Build the HTTP application of a replica."""
    endpoints = Endpoints(backend)
    # FastAPIOffline serves Swagger's files itself, so the pages need no network.
    api = FastAPIOffline(
        title="RevMUX", version=revmux.__version__, description=DESCRIPTION, redoc_url=None, redirect_slashes=False
    )
    failures.install(api)
    for make in (predict_routes, classify_routes, open_inference_routes):
        api.include_router(make(endpoints))
    api.include_router(operations_routes(backend))
    api.mount("/static", StaticFiles(directory=STATIC))
    if backend.tokens:
        api.add_middleware(BearerAuth, tokens=backend.tokens)
    api.add_middleware(Measured, metrics=backend.metrics)
    _describe(api, bool(backend.tokens))
    return HttpApplication(FastPath(endpoints, backend.tokens, backend.metrics, backend.tracing), api)


def _describe(app: FastAPI, needs_token: bool) -> None:
    """Add what the endpoints do not declare to the OpenAPI page: the schemas of request bodies, and the token."""
    schema = app.openapi()
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(examples.definitions(PredictRequest, ClassifyRequest, InferRequest))
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
        with self.metrics.measured(send, lambda: _route(scope)) as measured_send:
            await self.app(scope, receive, measured_send)


def _route(scope: dict[str, Any] | Scope) -> str:
    """Return the route's path pattern. Raw paths would create an unlimited number of metric labels."""
    return getattr(scope.get("route"), "path", None) or "other"
