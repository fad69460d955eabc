"""Endpoints for operators and browsers: health, configuration, metrics for Prometheus, and the page at ``/``."""

# No postponed annotations in this module: FastAPI reads those of the endpoints.
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serve_app import examples
from serve_app.backend import Backend
from serve_app.metrics import page

STATIC = Path(__file__).parent / "static"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


def operations_routes(backend: Backend) -> APIRouter:
    """Return the routes ``/health``, ``/info``, ``/metrics`` and ``GET /``."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", responses=examples.failures())
    async def health() -> JSONResponse:
        """Check that the model of one task answers a test input, each time another task. Otherwise return 503."""
        await backend.probe()
        return JSONResponse({"status": "ok"})

    @router.get("/info", responses=examples.failures())
    async def info() -> JSONResponse:
        """Return the served tasks, their adapters, and all limits."""
        return JSONResponse(await backend.describe())

    @router.get("/metrics", responses=examples.failures(), response_class=Response)
    async def metrics() -> Response:
        """Return the metrics of all replicas for Prometheus, each labeled with its replica."""
        by_replica = {backend.replica: backend.metrics.families()}
        if backend.peers is not None:
            by_replica |= await backend.peers()
        return Response(page(by_replica), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def browser_page() -> FileResponse:
        return FileResponse(STATIC / "page.html", headers=_PAGE_HEADERS)

    return router
