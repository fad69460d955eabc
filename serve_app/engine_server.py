"""The engine's end of the connections to its front ends. Independent of Ray."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import orjson

from revmux.serving import Draining
from serve_app.protocol import RequestOptions
from serve_app.service import Service
from serve_app.wire import (
    FRAME_BYTES,
    HELLO_BYTES,
    HELLO_SECONDS,
    VERSION,
    Address,
    Connection,
    Message,
    pack_answers,
    pack_error,
)

LAST_SECONDS = 2.0
"""Time for the last answers, once a stopping engine refuses what arrives."""

logger = logging.getLogger(__name__)


class EngineServer:
    """Answers front ends on a TCP port with a service.

    Args:
        service: classifies.
        host: interface to listen on.
        reached_at: host that front ends connect to.
        node: name of this machine.
    """

    def __init__(self, service: Service, host: str, reached_at: str, node: str = "") -> None:
        self.service = service
        self.host = host
        self.reached_at = reached_at
        self.node = node
        self.is_draining = False
        self.refuses = False
        self.sessions: set[_Session] = set()
        self._secret = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._port = 0
        self._is_left = asyncio.Event()

    async def start(self) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        self._server = await self._loop.create_server(lambda: _Session(self).connection, self.host, 0)
        self._port = self._server.sockets[0].getsockname()[1]

    def address(self) -> Address:
        """Return where this engine listens."""
        names = tuple(sorted(session.name for session in self.sessions))
        return Address(
            self.service.replica,
            self.node,
            self.reached_at,
            self._port,
            self._secret,
            VERSION,
            names,
            self.is_draining,
        )

    def proves(self, secret: object) -> bool:
        """Whether this is the secret."""
        return isinstance(secret, str) and hmac.compare_digest(secret.encode(), self._secret.encode())

    def tasks(self) -> Message:
        """The message that names the tasks."""
        return {"kind": "tasks", "names": self.service.task_names, "loaded": list(self.service.engine.tasks)}

    def announce_tasks(self, _: object = None) -> None:
        """Tell all front ends the tasks. May be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, self.tasks())

    def _tell(self, message: Message) -> None:
        for session in self.sessions:
            session.connection.send(message)

    def joined(self, session: _Session) -> None:
        """Count a front end that has proved who it is."""
        self.sessions.add(session)

    def left(self, session: _Session) -> None:
        """Forget a front end."""
        self.sessions.discard(session)
        if not self.sessions:
            self._is_left.set()

    async def drain(self, seconds: float) -> None:
        """Accept no connection, ask the front ends to leave, and end.

        Front ends leave as soon as another engine accepts them and this one has answered what they asked. Until then it
        goes on answering them, and refuses only what arrives after the time limit.

        Args:
            seconds: time limit.
        """
        self.is_draining = True
        if self._server is not None:
            self._server.close()
        self._tell({"kind": "draining"})
        self._is_left.clear()
        if self.sessions:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._is_left.wait()
        self.refuses = True
        running = [task for session in self.sessions for task in session.running.values()]
        if running:
            await asyncio.wait(running, timeout=LAST_SECONDS)
        for session in list(self.sessions):
            session.connection.close()


class _Session:
    """One connection to a front end."""

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self.service = server.service
        self.name = ""
        self.is_traced = False
        self.running: dict[int, asyncio.Task[None]] = {}
        self.connection = Connection(self._receive, self._lost, HELLO_BYTES)
        self._impatience = asyncio.get_running_loop().call_later(HELLO_SECONDS, self.connection.abort)
        self._calls: dict[str, Callable[[Message], Awaitable[Any]]] = {
            "classify": self._classify,
            "label_names": self._label_names,
            "probe": self._probe,
            "describe": self._describe,
        }

    def _receive(self, message: Message) -> None:
        kind = message["kind"]
        if not self.name:
            self._greet(message)
        elif kind == "cancel":
            if (task := self.running.get(message["id"])) is not None:
                task.cancel()
        else:
            number = message["id"]
            task = asyncio.get_running_loop().create_task(self._reply(number, self._calls[kind], message))
            self.running[number] = task
            task.add_done_callback(lambda _: self.running.pop(number))

    def _greet(self, message: Message) -> None:
        if message["kind"] != "hello" or not self.server.proves(message["secret"]) or not message["name"]:
            raise PermissionError("it does not know this engine's secret")
        self._impatience.cancel()
        self.name, self.is_traced = str(message["name"]), bool(message["traced"])
        self.connection.limit = FRAME_BYTES
        self.server.joined(self)
        self.connection.send(self.server.tasks())

    def _lost(self) -> None:
        self._impatience.cancel()
        for task in list(self.running.values()):
            task.cancel()  # nobody waits for these answers
        self.server.left(self)

    async def _reply(self, number: int, call: Callable[[Message], Awaitable[Any]], message: Message) -> None:
        try:
            if self.server.refuses:
                raise Draining("the server is shutting down and accepts no more requests; use another server")
            self.connection.send({"kind": "result", "id": number, "result": await call(message)})
        except Exception as error:
            packed = pack_error(error)
            if packed["error"] == "EngineFailed":
                logger.exception("a request of front end %s failed", self.name)
            self.connection.send({"kind": "error", "id": number, **packed})

    async def _classify(self, message: Message) -> list[Any]:
        options = _options(*message["options"])
        texts = [text if isinstance(text, str) else (text[0], text[1]) for text in message["texts"]]
        return [
            (one.task, one.label_names, pack_answers(one.answers, self.is_traced))
            for one in await self.service.classify(message["tasks"], texts, options)
        ]

    async def _label_names(self, message: Message) -> Any:
        return await self.service.label_names(message["task"])

    async def _probe(self, message: Message) -> None:
        await self.service.probe(message["task"])

    async def _describe(self, _: Message) -> Any:
        described = await self.service.describe()
        return orjson.loads(orjson.dumps(described, option=orjson.OPT_NON_STR_KEYS))  # numbers as keys become strings


@lru_cache(maxsize=256)  # most requests have the same
def _options(
    truncate: bool | None, max_multiplex: int | None, priority: float | None, timeout_ms: float | None
) -> RequestOptions:
    """Options that the front end has checked."""
    return RequestOptions.model_construct(
        truncate=truncate, max_multiplex=max_multiplex, priority=priority, timeout_ms=timeout_ms
    )
