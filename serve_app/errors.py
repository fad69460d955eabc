"""Answer every error as JSON: ``{"error", "error_type"}``, with the matching HTTP status."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from revmux.errors import EmptyText, UserError
from revmux.serving import Draining, InferenceFailed, Overloaded
from revmux.serving.errors import Expired, UnknownTask

RETRY_AFTER_SECONDS = 1


class Unauthorized(PermissionError):
    """The request has no bearer token, or an unknown one."""


class SlowBody(TimeoutError):
    """The body of a request did not arrive in time."""


class TooLarge(ValueError):
    """The request contains more bytes or texts than allowed."""


class Unhealthy(RuntimeError):
    """The model does not answer."""


_KINDS: dict[type[Exception], tuple[int, str]] = {
    EmptyText: (400, "empty"),
    ClientDisconnect: (400, "disconnected"),
    Unauthorized: (401, "unauthorized"),
    UnknownTask: (404, "unknown_task"),
    SlowBody: (408, "timeout"),
    TooLarge: (413, "too_large"),
    UserError: (422, "validation"),
    InferenceFailed: (424, "backend"),
    Overloaded: (429, "overloaded"),
    Expired: (504, "deadline"),
    Draining: (503, "unhealthy"),
    Unhealthy: (503, "unhealthy"),
    Exception: (500, "internal"),
}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},  # otherwise the rest of the body would be read as the next request
    429: {"Retry-After": str(RETRY_AFTER_SECONDS)},
    503: {"Retry-After": str(RETRY_AFTER_SECONDS)},
}
ERRORS = dict(sorted(set(_KINDS.values())))
"""The ``error_type`` of each error status."""


def refusal(error: Exception) -> JSONResponse:
    """Build the HTTP reply for an error."""
    # The nearest base class wins, as in FastAPI's choice of a handler.
    status, kind = next(_KINDS[known] for known in type(error).__mro__ if known in _KINDS)
    message = str(error) if status != 500 else "internal error; see the server's log for details"
    return JSONResponse({"error": message, "error_type": kind}, status, _HEADERS.get(status))


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    return refusal(error)


async def _refuse_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    return JSONResponse({"error": str(error.detail), "error_type": kind}, error.status_code, error.headers)


async def _refuse_parameters(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    reasons = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
    return JSONResponse({"error": reasons, "error_type": "validation"}, 422)


def install(app: FastAPI) -> None:
    """Register handlers that answer these errors as JSON."""
    for kind in _KINDS:
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
