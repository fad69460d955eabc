"""Optional bearer tokens, read from a file or an environment variable, never from the configuration itself."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from revmux.errors import UserError
from serve_app.errors import Unauthorized, refusal

OPEN_PATHS = frozenset({"/health", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
"""Paths that need no token: health checks for load balancers, and pages that are the same on every server."""
OPEN_FOLDERS = ("/static/", "/static-offline-docs/")


def read_tokens(token_file: str | None, token_env: str | None) -> tuple[bytes, ...]:
    """Read the accepted tokens. Without any, requests need no token.

    Args:
        token_file: file with one token per line. Several tokens allow clients to change from an old token to a new one.
        token_env: name of an environment variable with one token.

    Raises:
        UserError: the file or the variable is missing or contains no token, so that a configured server never starts
            without tokens.
    """
    tokens: list[str] = []
    if token_file is not None:
        try:
            lines = Path(token_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read token_file {token_file!r} ({error}); give a text file with a token") from None
        nonempty = [line.strip() for line in lines if line.strip()]
        if not nonempty:
            raise UserError(f"token_file {token_file!r} contains no token; write one per line, or omit token_file")
        tokens += nonempty
    if token_env is not None:
        token = os.environ.get(token_env, "").strip()
        if not token:
            raise UserError(
                f"the environment variable {token_env} is unset or empty on the replica's node; export it before "
                "`ray start` on that node, or use token_file"
            )
        tokens.append(token)
    return tuple(token.encode() for token in tokens)


MISSING_TOKEN = "missing or unknown token; send the header Authorization: Bearer TOKEN"


def is_authorized(headers: Headers, tokens: Sequence[bytes]) -> bool:
    """Whether a request has one of the tokens."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Headers are latin-1. Every token is compared in constant time, so the response time reveals nothing.
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), token) for token in tokens]
    return scheme.lower() == "bearer" and any(matches)


class BearerAuth:
    """Middleware that answers requests without a valid token with 401, before their body is read.

    Args:
        app: the wrapped application.
        tokens: tokens from :func:`read_tokens`.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[bytes]) -> None:
        self.app = app
        self.tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope) and not is_authorized(Headers(scope=scope), self.tokens):
            refused = refusal(Unauthorized(MISSING_TOKEN))
            await refused(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path = path_in_app(scope)
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or (path == "/" and scope["method"] == "GET")


def path_in_app(scope: Scope) -> str:
    """The path without the prefix under which the application is mounted, such as Serve's route_prefix."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path
