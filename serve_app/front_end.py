"""A front end: the backend of a replica that answers HTTP and asks an engine in another process. Independent of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client.core import Metric

from revmux.text import Text
from serve_app.auth import read_tokens
from serve_app.backend import TaskAnswers, TaskNames
from serve_app.config import AppConfig
from serve_app.engine_link import DETACHED, EngineLink
from serve_app.errors import Unhealthy
from serve_app.metrics import ReplicaMetrics
from serve_app.protocol import RequestOptions
from serve_app.tracing import tracing_from_environment
from serve_app.wire import VERSION, Address, unpack_answers

RETRY_SECONDS = 0.5
"""Time between two attempts to find an engine."""

BALANCE_SECONDS = 5.0
"""Time between two looks at the other engines."""

PROBE_SECONDS = 20.0
"""Time limit of a health check, longer than that of the engine itself."""

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
        self._link: EngineLink | None = None
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

    async def classify(self, names: TaskNames, texts: Sequence[Text], options: RequestOptions) -> list[TaskAnswers]:
        """Let the engine classify texts."""
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

    def _attached_link(self) -> EngineLink:
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
                logger.warning("cannot find an engine: %s: %s", type(error).__name__, error)
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
        link = await EngineLink.open(engine, self.replica, self.tracing is not None, self._on_link)
        before, self._link = self._link, link
        self._attached.set()
        if before is not None:
            before.leave()
        logger.info("connected to the engine %s", engine.engine)
        self._on_link(link)

    def _on_link(self, link: EngineLink) -> None:
        """React to a change of a link: its tasks, an announced end, or its end."""
        if link is not self._link:
            return
        if not link.connection.is_open:
            self._link = None
            logger.warning("lost the connection to the engine %s", link.address.engine)
            self._changed.set()
        elif link.is_draining:
            self._changed.set()
        elif self._on_tasks is not None:
            self._on_tasks(link.loaded)
