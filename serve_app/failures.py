"""Every refusal as JSON: ``{"error", "error_type"}`` and a status that says whose turn it is."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from revmux.errors import UserError
from revmux.serving import Draining, EmptyText, InferenceFailed, Overloaded

RETRY_AFTER_SECONDS = 1


class TooLarge(ValueError):
    """More bytes or texts than one request may hold."""


class Unhealthy(RuntimeError):
    """The model does not answer."""


_KINDS: dict[type[Exception], tuple[int, str]] = {
    EmptyText: (400, "empty"),
    TooLarge: (413, "too_large"),
    UserError: (422, "validation"),
    InferenceFailed: (424, "backend"),
    Overloaded: (429, "overloaded"),
    Draining: (503, "unhealthy"),
    Unhealthy: (503, "unhealthy"),
    Exception: (500, "internal"),
}


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    # The nearest class wins, as FastAPI has chosen the handler.
    status, kind = next(_KINDS[known] for known in type(error).__mro__ if known in _KINDS)
    message = str(error) if status != 500 else "an internal error; the server's log has the details"
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
    return JSONResponse({"error": message, "error_type": kind}, status, headers)


async def _refuse_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    return JSONResponse({"error": str(error.detail), "error_type": kind}, error.status_code, error.headers)


def install(app: FastAPI) -> None:
    """Let ``app`` answer these errors as JSON."""
    for kind in _KINDS:
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
