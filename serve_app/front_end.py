"""A front end: the backend of a replica that answers HTTP and asks an engine in another process. Independent of Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from prometheus_client.core import Metric

from revmux.text import Text
from serve_app.auth import read_tokens
from serve_app.backend import Classify, TaskAnswers, TaskNames
from serve_app.config import AppConfig
from serve_app.errors import Unhealthy
from serve_app.metrics import ReplicaMetrics
from serve_app.protocol import RequestOptions
from serve_app.tracing import tracing_from_environment
from serve_app.wire import (
    FRAME_BYTES,
    HELLO_SECONDS,
    VERSION,
    Address,
    Connection,
    Message,
    unpack_answers,
    unpack_error,
)

RETRY_SECONDS = 0.5
"""Time between two attempts to find an engine."""

BALANCE_SECONDS = 5.0
"""Time between two looks at the other engines."""

PROBE_SECONDS = 20.0
"""Time limit of a health check, longer than that of the engine itself."""

DETACHED = "this front end has lost its engine and looks for another one; retry later"

logger = logging.getLogger(__name__)


class FrontEnd:
    """Passes on the questions of HTTP endpoints to one engine, see :class:`serve_app.backend.Backend`.

    It looks for another engine when it has lost its own, when its own is about to stop, and when another engine has fewer
    front ends. What an engine has been asked, it still answers.

    Args:
        config: the application's configuration.
        replica: the name of this replica.
        engines: returns the engines that run.
        node: name of this machine.
        on_tasks: called with the names of the tasks that the engine has loaded, after each change.

    Raises:
        UserError: the tokens cannot be read, or an exporter of traces is not installed.
    """

    def __init__(
        self,
        config: AppConfig,
        replica: str,
        engines: Callable[[], Awaitable[Sequence[Address]]],
        node: str = "",
        on_tasks: Callable[[list[str]], None] | None = None,
    ) -> None:
        self.config = config
        self.replica = replica
        self.tokens = read_tokens(config.token_file, config.token_env)
        self.tracing = tracing_from_environment(replica)
        self.metrics = ReplicaMetrics(config.max_queue)
        self.peers: Callable[[], Awaitable[dict[str, list[Metric]]]] | None = None
        self._engines = engines
        self._node = node
        self._on_tasks = on_tasks
        self._link: _Link | None = None
        self._changed = asyncio.Event()
        self._attached = asyncio.Event()
        self._attending: asyncio.Task[None] | None = None

    @property
    def engine(self) -> str | None:
        """The name of the engine; None while this front end looks for one."""
        return self._link.address.engine if self._link is not None else None

    async def start(self) -> None:
        """Find an engine, and keep to it or others from now on. Return once there is one."""
        self._attending = asyncio.get_running_loop().create_task(self._attend())
        await self._attached.wait()

    async def close(self) -> None:
        """Leave the engine, and export the last traces."""
        if self._attending is not None:
            self._attending.cancel()
            with suppress(asyncio.CancelledError):
                await self._attending
        if self._link is not None:
            link, self._link = self._link, None
            link.connection.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    @property
    def task_names(self) -> list[str]:
        """The names of all tasks, also of those that are not loaded."""
        return self._attached_link().task_names

    async def find(self, names: TaskNames) -> Classify:
        """Find tasks by what the engine last told. Ask it only if that does not suffice."""
        known = self._attached_link().task_names
        if names == "*" and known:
            return partial(self._classify, known)
        if names != "*" and all(name in known or (name is None and len(known) == 1) for name in names):
            return partial(self._classify, [known[0] if name is None else name for name in names])
        await self._ask("find", tasks=names)
        return partial(self._classify, names)

    async def _classify(self, names: TaskNames, texts: Sequence[Text], options: RequestOptions) -> list[TaskAnswers]:
        chosen = (options.truncate, options.max_multiplex, options.priority, options.timeout_ms)
        found = await self._ask("classify", tasks=names, texts=texts, options=chosen)
        return [TaskAnswers(task, labels, unpack_answers(packed)) for task, labels, packed in found]

    async def label_names(self, task: str) -> Sequence[str]:
        """Return the labels of a task."""
        found: list[str] = await self._ask("label_names", task=task)
        return found

    async def probe(self, task: str | None = None) -> None:
        """Check that the model of one task answers.

        Raises:
            UnknownTask: there is no such task.
            Unhealthy: it does not answer, or this front end has no engine.
        """
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._ask("probe", task=task)
        except TimeoutError:
            raise Unhealthy(f"the engine {self.engine} has not answered for {PROBE_SECONDS:g} s") from None

    async def describe(self) -> dict[str, Any]:
        """Return the engine's tasks, limits and counts, and the name of this front end."""
        found: dict[str, Any] = await self._ask("describe")
        return found | {"front_end": self.replica}

    def _attached_link(self) -> _Link:
        if self._link is None:
            raise Unhealthy(DETACHED)
        return self._link

    async def _ask(self, kind: str, **fields: Any) -> Any:
        return await self._attached_link().ask({"kind": kind, **fields})

    async def _attend(self) -> None:
        """Look for an engine as long as there is a reason."""
        while True:
            self._changed.clear()
            needs_one = self._link is None or self._link.is_draining
            try:
                await self._look(needs_one)
            except Exception as error:
                logger.warning("cannot look for an engine: %s: %s", type(error).__name__, error)
            needs_one = self._link is None or self._link.is_draining
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if needs_one else BALANCE_SECONDS):
                    await self._changed.wait()

    async def _look(self, needs_one: bool) -> None:
        found = [one for one in await self._engines() if one.version == VERSION and not one.is_draining]
        own = next((one for one in found if one.engine == self.engine), None)
        others = sorted((one for one in found if one.engine != self.engine), key=self._preference)
        if not needs_one and (own is None or not others or not self._should_move(own, others[0])):
            return
        for other in others:
            try:
                await self._attach(other)
            except (OSError, TimeoutError, Unhealthy) as error:
                logger.warning("cannot reach the engine %s: %s", other.engine, error)
            else:
                return

    def _preference(self, engine: Address) -> tuple[bool, bool, int]:
        """Sort key: engines that lack front ends first, then those of this machine, then those with the fewest."""
        attached = len(engine.front_ends)
        return attached >= self.config.front_ends, engine.node != self._node, attached

    def _should_move(self, own: Address, other: Address) -> bool:
        """Whether this front end is the one that leaves its engine, so that each has the same number."""
        return len(own.front_ends) - len(other.front_ends) >= 2 and own.front_ends[0] == self.replica

    async def _attach(self, engine: Address) -> None:
        link = await _Link.open(engine, self.replica, self.tracing is not None, self._on_link)
        before, self._link = self._link, link
        self._attached.set()
        if before is not None:
            before.leave()
        logger.info("attached to the engine %s", engine.engine)
        self._on_link(link)

    def _on_link(self, link: _Link) -> None:
        """React to a change of a link: its tasks, an announced end, or its end."""
        if link is not self._link:
            return
        if not link.connection.is_open:
            self._link = None
            logger.warning("lost the engine %s", link.address.engine)
            self._changed.set()
        elif link.is_draining:
            self._changed.set()
        elif self._on_tasks is not None:
            self._on_tasks(link.loaded)


class _Link:
    """A connection to one engine."""

    def __init__(self, address: Address, on_change: Callable[[_Link], None]) -> None:
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
    async def open(cls, address: Address, name: str, is_traced: bool, on_change: Callable[[_Link], None]) -> _Link:
        """Connect to an engine.

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
