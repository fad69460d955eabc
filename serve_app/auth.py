"""Who may ask: optional bearer tokens, from a file or an environment variable, never from the configuration itself."""

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
"""What anyone may ask: health for load balancers, and pages that are the same on every server."""
OPEN_FOLDERS = ("/static/", "/static-offline-docs/")


def read_tokens(token_file: str | None, token_env: str | None) -> tuple[bytes, ...]:
    """The tokens that open the server; none means that it is open to all.

    Args:
        token_file: a file with a token a line; several let an old one live on while clients change.
        token_env: an environment variable with one token.

    Raises:
        UserError: the file or the variable is missing or holds no token. A server that should be closed never opens.
    """
    tokens: list[str] = []
    if token_file is not None:
        try:
            lines = Path(token_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read token_file {token_file!r} ({error}); give a text file with a token") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"token_file {token_file!r} holds no token; write one a line, or leave token_file out")
        tokens += found
    if token_env is not None:
        token = os.environ.get(token_env, "").strip()
        if not token:
            raise UserError(
                f"the environment variable {token_env} holds no token on the replica's node; export it before "
                "`ray start` there, or use token_file"
            )
        tokens.append(token)
    return tuple(token.encode() for token in tokens)


class BearerAuth:
    """Answers 401 without a known token, before the body is read.

    Args:
        app: what is behind it.
        tokens: as :func:`read_tokens` gives them.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[bytes]) -> None:
        self.app = app
        self.tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope) and not self._knows(Headers(scope=scope)):
            refused = refusal(Unauthorized("send a known token as Authorization: Bearer TOKEN"))
            await refused(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers come as latin-1. All tokens are compared, each in constant time: the reply's time tells nothing.
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), token) for token in self.tokens]
        return scheme.lower() == "bearer" and any(matches)


def _is_open(scope: Scope) -> bool:
    # ASGI's path includes the prefix under which the application is mounted, such as Serve's route_prefix.
    path: str = scope["path"]
    root = str(scope.get("root_path", "")).rstrip("/")
    if root and path.startswith(f"{root}/"):
        path = path.removeprefix(root)
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or (path == "/" and scope["method"] == "GET")
