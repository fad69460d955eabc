"""Answer classification requests without FastAPI's layers, which cost more than a small model.

The endpoints are those of :mod:`serve_app.predict`. All other requests, and the description of every endpoint, are FastAPI's.
"""

from __future__ import annotations

import logging
import re

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.auth import MISSING_TOKEN, is_authorized, path_in_app
from serve_app.errors import Unauthorized, refusal
from serve_app.metrics import ReplicaMetrics
from serve_app.predict import Endpoint, Endpoints, JsonReply
from serve_app.tracing import Tracing

logger = logging.getLogger(__name__)

_WITH_TASK = re.compile(r"/(?:tasks/(?P<predict>[^/]+)/predict|v2/models/(?P<infer>[^/]+)/infer)")


class FastPath:
    """The endpoints for classification.

    Args:
        endpoints: the endpoints.
        tokens: accepted bearer tokens. If there are none, requests need no token.
        metrics: counts the replies.
        tracing: traces the requests; None if it is off.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        tokens: tuple[bytes, ...],
        metrics: ReplicaMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.endpoints = endpoints
        self.tokens = tokens
        self.metrics = metrics
        self.tracing = tracing

    async def answers(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request for a classification. Return False, and do nothing, if it is another one."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        found = self._find(path_in_app(scope))
        if found is None:
            return False
        endpoint, task, route = found
        with self.metrics.measured(send, lambda: route) as measured_send:
            if self.tracing is None:
                reply = await self._reply(endpoint, Request(scope, receive), task)
                await reply(scope, receive, measured_send)
                return True
            with self.tracing.request(scope, route) as traced:
                reply = await self._reply(endpoint, Request(scope, receive), task)
                traced.replied(reply, reply.answers if isinstance(reply, JsonReply) else ())
                await reply(scope, receive, measured_send)
        return True

    def _find(self, path: str) -> tuple[Endpoint, str | None, str] | None:
        """Return the endpoint, the name of the task, and the pattern of the path."""
        if path in ("/predict", "/"):
            return self.endpoints.predict, None, path
        if path == "/classify":
            return self.endpoints.classify, None, path
        match = _WITH_TASK.fullmatch(path)
        if match is None:
            return None
        if task := match["predict"]:
            return self.endpoints.predict, task, "/tasks/{task}/predict"
        return self.endpoints.infer, match["infer"], "/v2/models/{task}/infer"

    async def _reply(self, endpoint: Endpoint, request: Request, task: str | None) -> Response:
        if self.tokens and not is_authorized(Headers(scope=request.scope), self.tokens):
            return refusal(Unauthorized(MISSING_TOKEN))
        try:
            return await endpoint(request, task)
        except Exception as error:
            reply = refusal(error)
            if reply.status_code == 500:
                logger.exception("a request to %s failed", request.url.path)
            return reply
