"""The tasks of a replica: which are served, and which of them are loaded."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from revmux.errors import UserError
from revmux.estimate.peak import StorageCounter
from revmux.estimate.serving_memory import KeptMemory, kept_memory
from revmux.serving import Engine
from revmux.serving.adapters import LineupPlace
from revmux.serving.errors import UnknownTask
from revmux.serving.task import Lineup, Task
from revmux.utils.redact import without_passwords
from serve_app.config import AppConfig, TaskConfig
from serve_app.errors import Unhealthy
from serve_app.kept_memory import describe_memory
from serve_app.measured_loss import log_loss
from serve_app.task_loading import FetchedAdapters, fetch_adapters, load_task

logger = logging.getLogger(__name__)

_FIXED = ("model", "revision", "dtype", "prompt", "max_length", "threshold")


class ServedTasks:
    """The served tasks of an engine.

    With ``memory_gb``, tasks are loaded on first use, and those that were not used for longest are removed when others
    need room. Otherwise all are loaded.

    Args:
        config: the application's configuration. Its tasks are not loaded until :meth:`change` is called.
        engine: the engine that runs the loaded tasks.

    Attributes:
        served: the configuration of all tasks, by name.
        adapters: the adapters of each loaded task. Their folders may be gone.
        memory: what each loaded task keeps in memory.
    """

    def __init__(self, config: AppConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.served: dict[str, TaskConfig] = {}
        self.adapters: dict[str, FetchedAdapters] = {}
        self.memory: dict[str, KeptMemory] = {}
        self._changing = threading.Lock()
        self._loading: dict[str, asyncio.Future[Task | None]] = {}
        self._uses = itertools.count()
        self._last_use: dict[str, int] = {}  # by task

    @property
    def names(self) -> list[str]:
        """The names of all tasks, also of those that are not loaded."""
        return list(self.served)

    @property
    def not_loaded(self) -> list[str]:
        """The names of the tasks that are not loaded."""
        loaded = self.engine.tasks
        return [name for name in self.served if name not in loaded]

    def change(self, tasks: Mapping[str, TaskConfig]) -> None:
        """Change the served tasks and adapters to these, without interrupting requests.

        New tasks and adapters are loaded and checked first. After an error nothing has changed.

        Args:
            tasks: all tasks by name.

        Raises:
            UserError: a model or adapter does not fit, or a served task has another model or other fixed settings.
        """
        with self._changing, TemporaryDirectory(prefix="revmux-adapters-") as downloads:
            loaded = self.engine.tasks
            now = {name: task for name, task in tasks.items() if name in loaded or self.config.memory_gb is None}
            requested = {name: self._fetched(task, Path(downloads)) for name, task in now.items()}
            for name in now:
                if name in loaded:
                    self._check_same(name, tasks[name])
            added: list[Task] = []
            lineups: dict[str, Lineup] = {}
            for name, adapters in requested.items():
                if name not in loaded:
                    added.append(self._loaded(name, tasks[name], adapters))
                    continue
                served = self.adapters[name]
                # The digest finds adapters that were trained again in their folder, and aliases that name another version.
                new = [
                    adapter.folder
                    for place, adapter in adapters.items()
                    if place not in served or served[place].digest != adapter.digest
                ]
                removed = served.keys() - adapters.keys()
                if new or removed:
                    lineups[name] = self.engine.task(name).lineup_with(new, removed)
            self.engine.change(added, lineups, loaded.keys() - tasks.keys())
            before = self.adapters
            self.served = dict(tasks)
            self.adapters = requested
            self._count_memory()
            for name, adapters in requested.items():
                for place, adapter in adapters.items():
                    known = before.get(name, {}).get(place)
                    if known is None or known.digest != adapter.digest:
                        self._log_loss(name, place, adapter.source)
        if self.config.memory_gb is not None:
            self._last_use = {name: use for name, use in self._last_use.items() if name in tasks}
            self._fill_memory()

    def _check_same(self, name: str, task: TaskConfig) -> None:
        for setting in _FIXED:
            old, new = getattr(self.served[name], setting), getattr(task, setting)
            if old != new:
                raise UserError(
                    f"task {name!r} is already served with {setting} {old!r}, not {new!r}; give the new task another "
                    "name, or deploy new replicas"
                )

    def _fill_memory(self) -> None:
        """Load tasks in their order until the next one does not fit, so that most first requests need not wait.

        Raises:
            UserError: not a single task can be loaded.
        """
        for name in self.not_loaded:
            try:
                if self._load(name, evict=False) is None:
                    return
            except UserError as error:
                if not self.engine.tasks:
                    raise
                logger.error("task %r cannot be loaded: %s", name, without_passwords(str(error)))

    async def get(self, name: str | None = None) -> Task:
        """Return a task, after loading it if necessary; None is the only task.

        Raises:
            UnknownTask: there is no such task, or there are several and no name is given.
            Unhealthy: the task cannot be loaded.
        """
        if self.config.memory_gb is None:
            return self.engine.task(name)
        known = self.served
        if name is None and len(known) == 1:
            name = next(iter(known))
        if name is None or name not in known:
            raise UnknownTask(name, known)
        self._last_use[name] = next(self._uses)
        if (task := self.engine.tasks.get(name)) is not None:
            return task
        if name not in self._loading:
            self._loading[name] = asyncio.ensure_future(asyncio.to_thread(self._load, name))
            self._loading[name].add_done_callback(lambda _: self._loading.pop(name))
        try:
            # Shielded, because other requests may wait for the same task.
            found = await asyncio.shield(self._loading[name])
        except UnknownTask:  # it was removed meanwhile
            raise
        except Exception as error:
            message = without_passwords(f"task {name!r} cannot be loaded: {error}")
            logger.error(message)
            raise Unhealthy(message) from error
        assert found is not None
        return found

    async def several(self, names: Sequence[str]) -> list[Task]:
        """Return several tasks, after loading those that are not loaded.

        Raises:
            UserError: they do not fit into memory together. Other errors are those of :meth:`get`.
        """
        known = self.engine.tasks if self.config.memory_gb is None else self.served
        for name in names:
            if name not in known:
                raise UnknownTask(name, known)
        found = [await self.get(name) for name in names]
        gone = [name for name in names if name not in self.engine.tasks]
        if gone and self.config.memory_gb is not None:
            raise UserError(
                f"the {len(names)} tasks do not fit into memory_gb ({self.config.memory_gb:g}) together: {gone[0]!r} was "
                "removed for the others; name fewer tasks per request, or raise memory_gb"
            )
        return found

    def _load(self, name: str, evict: bool = True) -> Task | None:
        """Load a task, and remove those that were not used for longest until all fit into ``memory_gb``.

        Args:
            name: the task.
            evict: whether other tasks may be removed. Otherwise the task itself is, if it does not fit.

        Returns:
            The task, or None if it does not fit.
        """
        assert self.config.memory_gb is not None
        with self._changing, TemporaryDirectory(prefix="revmux-adapters-") as downloads:
            if (task := self.engine.tasks.get(name)) is not None:
                return task
            if (config := self.served.get(name)) is None:
                raise UnknownTask(name, self.served)
            adapters = self._fetched(config, Path(downloads))
            task = self._loaded(name, config, adapters)
            self.engine.change([task])
            self.adapters[name] = adapters
            while (size := sum(kept.total for kept in self._kept().values()) / 1e9) > self.config.memory_gb:
                others = [other for other in self.engine.tasks if other != name]
                if not others:
                    logger.warning(
                        "task %r alone takes %.3g GB, more than memory_gb (%g); raise memory_gb",
                        name,
                        size,
                        self.config.memory_gb,
                    )
                    break
                removed = min(others, key=lambda other: self._last_use.get(other, -1)) if evict else name
                self.engine.change(remove=[removed])
                self.adapters.pop(removed, None)
                if removed == name:
                    return None
            self._count_memory()
            for place, adapter in adapters.items():
                self._log_loss(name, place, adapter.source)
            return task

    def _fetched(self, task: TaskConfig, downloads: Path) -> FetchedAdapters:
        return fetch_adapters(task, downloads, self.config.max_multiplex)

    def _loaded(self, name: str, task: TaskConfig, adapters: FetchedAdapters) -> Task:
        device = "cuda" if self.config.num_gpus else "cpu"
        return load_task(name, task, adapters, self.engine.limits, device)

    def _log_loss(self, name: str, place: LineupPlace, source: str) -> None:
        task = self.engine.task(name)
        adapter = next(adapter for adapter in task.lineup.adapters if adapter.place == place)
        log_loss(adapter.config, source, task.threshold, self.config)

    def _count_memory(self) -> None:
        """Count what the tasks keep in memory, and log those that changed."""
        before, self.memory = self.memory, self._kept()
        for line in self.memory_lines(before):
            logger.info("%s", line)

    def _kept(self) -> dict[str, KeptMemory]:
        """What each loaded task keeps in memory. Weights that tasks share count for the first one."""
        counter = StorageCounter()
        return {
            name: kept_memory(task.backbone, [adapter.model for adapter in task.lineup.adapters], counter)
            for name, task in self.engine.tasks.items()
        }

    def memory_lines(self, before: Mapping[str, KeptMemory] | None = None) -> list[str]:
        """Return a line per task about what it keeps in memory, without those that have not changed.

        Args:
            before: what the tasks kept at an earlier time.
        """
        return [
            describe_memory(name, kept, self.config.merge_limit_mib)
            for name, kept in self.memory.items()
            if kept != (before or {}).get(name)
        ]
