"""The connection of a front end to its engine. Independent of Ray."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from serve_app.errors import Unhealthy
from serve_app.wire import FRAME_BYTES, HELLO_SECONDS, Address, Connection, Message, unpack_error

DETACHED = "this front end has lost its engine and is looking for another one; retry later"


class EngineLink:
    """A front end's connection to one engine. It ends by itself once the engine is gone.

    Args:
        address: where the engine listens.
        on_change: called when the engine's tasks change, when it announces its end, and when the connection ends.

    Attributes:
        task_names: the names of all tasks of the engine, also of those that are not loaded.
        loaded: the names of those that are.
        is_draining: whether the engine is about to stop.
    """

    def __init__(self, address: Address, on_change: Callable[[EngineLink], None]) -> None:
        self.address = address
        self.is_draining = False
        self.task_names: list[str] = []
        self.loaded: list[str] = []
        self.connection = Connection(self._receive, self._lost, FRAME_BYTES)
        self._on_change = on_change
        self._is_left = False
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    @classmethod
    async def open(
        cls, address: Address, name: str, is_traced: bool, on_change: Callable[[EngineLink], None]
    ) -> EngineLink:
        """Connect to an engine.

        Args:
            address: where the engine listens.
            name: the name of this front end.
            is_traced: whether answers shall have the steps of their forward pass.
            on_change: see :class:`EngineLink`.

        Raises:
            OSError, TimeoutError: it does not answer.
            Unhealthy: it refuses the connection.
        """
        link = cls(address, on_change)
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: link.connection, address.host, address.port)
                link.connection.send({"kind": "hello", "secret": address.secret, "name": name, "traced": is_traced})
                await link._welcome
        except BaseException:
            link.connection.abort()
            raise
        return link

    async def ask(self, message: Message) -> Any:
        """Send a message and return the result. Cancelling the call cancels the request.

        Raises:
            Unhealthy: the connection has ended. Other errors are the engine's.
        """
        if not self.connection.is_open:
            raise Unhealthy(DETACHED)
        number = next(self._numbers)
        self.connection.send({**message, "id": number})
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            return await answer
        except asyncio.CancelledError:
            if self._waiting.pop(number, None) is not None:
                self.connection.send({"kind": "cancel", "id": number})
            raise
        finally:
            self._close_if_done()

    def leave(self) -> None:
        """End the connection once everything that was asked is answered."""
        self._is_left = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_left and not self._waiting:
            self.connection.close()

    def _receive(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "result":
            if (answer := self._waiting.pop(message["id"], None)) is not None and not answer.done():
                answer.set_result(message["result"])
        elif kind == "error":
            if (answer := self._waiting.pop(message["id"], None)) is not None and not answer.done():
                answer.set_exception(unpack_error(message))
        elif kind == "tasks":
            self.task_names, self.loaded = message["names"], message["loaded"]
            if not self._welcome.done():
                self._welcome.set_result(None)
            self._on_change(self)
        else:
            assert kind == "draining"
            self.is_draining = True
            self._on_change(self)

    def _lost(self) -> None:
        if not self._welcome.done():
            self._welcome.set_exception(Unhealthy("it closed the connection"))
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(Unhealthy("the engine stopped while it held this request; retry it"))
        self._on_change(self)
