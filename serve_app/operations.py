"""What operators and people ask: health, what is served, figures for Prometheus, and the page at ``/``."""

# No postponed annotations here: FastAPI reads those of the endpoints.
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serve_app import examples
from serve_app.metrics import page
from serve_app.service import Service

STATIC = Path(__file__).parent / "static"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


def operations_routes(service: Service) -> APIRouter:
    """``/health``, ``/info``, ``/metrics`` and ``GET /``."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", responses=examples.failures())
    async def health() -> JSONResponse:
        """200 if every model has just answered a text, else 503."""
        await service.probe()
        return JSONResponse({"status": "ok"})

    @router.get("/info", responses=examples.failures())
    async def info() -> JSONResponse:
        """What is served, with every limit."""
        return JSONResponse(service.info())

    @router.get("/metrics", responses=examples.failures(), response_class=Response)
    async def metrics() -> Response:
        """The figures of all replicas for Prometheus, each labelled with its replica."""
        figures = {service.replica: service.metrics.families()}
        if service.peers is not None:
            figures |= await service.peers()
        return Response(page(figures), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def human_page() -> FileResponse:
        return FileResponse(STATIC / "page.html", headers=_PAGE_HEADERS)

    return router
