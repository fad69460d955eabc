"""The tasks of a replica: which are served, and which of them are loaded."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from revmux.errors import UserError
from revmux.pretrained.shared_base import SharedBases
from revmux.serving import Engine
from revmux.serving.adapters import LineupPlace
from revmux.serving.errors import UnknownTask
from revmux.serving.task import Lineup, Task
from revmux.utils.redact import without_passwords
from serve_app.config import AppConfig, TaskConfig
from serve_app.errors import Unhealthy
from serve_app.kept_memory import MemoryCount, describe_memory
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
        memory: what the loaded tasks keep in memory.
        on_loaded: called with the names of the loaded tasks after each change; None calls nothing.
    """

    def __init__(self, config: AppConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.served: dict[str, TaskConfig] = {}
        self.adapters: dict[str, FetchedAdapters] = {}
        self.memory = MemoryCount()
        self.on_loaded: Callable[[list[str]], None] | None = None
        self._bases = SharedBases()
        self._changing = threading.Lock()
        self._loading: dict[frozenset[str], asyncio.Future[dict[str, Task]]] = {}
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

        New tasks and adapters are loaded and checked first. After an error nothing has changed. With ``memory_gb``, a new
        task is checked when it is loaded; at least one task is always loaded.

        Args:
            tasks: all tasks by name.

        Raises:
            UserError: a model or adapter does not fit, or a served task has another model or other fixed settings.
            Exception: any other error of loading a model.
        """
        with self._changing, TemporaryDirectory(prefix="revmux-adapters-") as downloads:
            for name in tasks.keys() & self.served.keys():
                self._check_same(name, tasks[name])
            loaded = self.engine.tasks
            now = {name: task for name, task in tasks.items() if name in loaded or self.config.memory_gb is None}
            requested = {name: self._fetched(task, Path(downloads)) for name, task in now.items()}
            added: list[Task] = []
            lineups: dict[str, Lineup] = {}
            for name, adapters in requested.items():
                if name not in loaded:
                    added.append(self._loaded(name, tasks[name], adapters, Path(downloads)))
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
            if tasks and not requested:
                name, requested[name], task = self._first_that_loads(tasks, Path(downloads))
                added.append(task)
            self.engine.change(added, lineups, loaded.keys() - tasks.keys())
            before = self.adapters
            self.served = dict(tasks)
            self.adapters = requested
            for name in loaded.keys() - tasks.keys() | lineups.keys():
                self.memory.remove(name)
            for name in [*(task.name for task in added), *lineups]:
                self._count(self.engine.task(name))
            if self.config.memory_gb is not None:
                for task in added:
                    self._make_room(task.name, keep=[task.name])
            self._report()
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

    def _first_that_loads(self, tasks: Mapping[str, TaskConfig], downloads: Path) -> tuple[str, FetchedAdapters, Task]:
        """Load the first task that can be loaded, and return its name and adapters too.

        Raises:
            Exception: no task can be loaded; the error of the first one.
        """
        errors: list[Exception] = []
        for name, config in tasks.items():
            try:
                adapters = self._fetched(config, downloads)
                return name, adapters, self._loaded(name, config, adapters, downloads)
            except Exception as error:
                errors.append(error)
                _log_failure(name, error)
        raise errors[0]

    def _fill_memory(self) -> None:
        """Load tasks in their order until the next one does not fit, so that most first requests need not wait."""
        for name in self.not_loaded:
            try:
                with self._changing:
                    if self._load(name, keep=self.engine.tasks) is None:
                        return
            except Exception as error:  # a task that cannot be loaded harms no other
                _log_failure(name, error)

    async def get(self, name: str | None = None) -> Task:
        """Return a task, after loading it if necessary; None is the only task.

        Raises:
            UnknownTask: there is no such task, or there are several and no name is given.
            Unhealthy: the task cannot be loaded.
        """
        [task] = await self.several([name])
        return task

    async def several(self, names: Sequence[str | None]) -> list[Task]:
        """Return several tasks, after loading those that are not loaded. None of them is removed for another meanwhile.

        Args:
            names: names of tasks; None is the only task.

        Raises:
            UnknownTask: there is no task of one of the names, or there are several and no name is given.
            UserError: they do not fit into memory together.
            Unhealthy: one of them cannot be loaded.
        """
        if self.config.memory_gb is None:
            return [self.engine.task(name) for name in names]
        named = [self._named(name) for name in names]
        for name in named:
            self._last_use[name] = next(self._uses)
        loaded = self.engine.tasks
        if all(name in loaded for name in named):
            return [loaded[name] for name in named]
        key = frozenset(named)
        if key not in self._loading:
            self._loading[key] = asyncio.ensure_future(asyncio.to_thread(self._load_together, named))
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key))
        # Shielded, because other requests may wait for the same tasks.
        found = await asyncio.shield(self._loading[key])
        return [found[name] for name in named]

    def _named(self, name: str | None) -> str:
        """The name of a served task; None is the only one."""
        known = self.served
        if name is None and len(known) == 1:
            return next(iter(known))
        if name is None or name not in known:
            raise UnknownTask(name, known)
        return name

    def _load_together(self, names: Sequence[str]) -> dict[str, Task]:
        """Load those of the tasks that are not loaded. A caller keeps the returned tasks even if others replace them.

        Raises:
            UnknownTask: one of them was removed meanwhile.
            UserError: they do not fit into memory together.
            Unhealthy: one of them cannot be loaded.
        """
        found: dict[str, Task] = {}
        with self._changing:
            for name in names:
                try:
                    task = self._load(name, keep=names)
                except UnknownTask:
                    raise
                except Exception as error:
                    message = without_passwords(f"task {name!r} cannot be loaded: {error}")
                    logger.error(message)
                    raise Unhealthy(message) from error
                if task is None:
                    raise UserError(
                        f"the {len(names)} tasks do not fit into memory_gb ({self.config.memory_gb:g}) together; name "
                        "fewer tasks per request, or raise memory_gb"
                    )
                found[name] = task
        return found

    def _load(self, name: str, keep: Collection[str]) -> Task | None:
        """Load a task, and remove those that were not used for longest until all fit into ``memory_gb``.

        The caller holds the lock.

        Args:
            name: the task.
            keep: tasks that are not removed. If these do not fit together with the task, the task is not kept, unless
                it is the only one.

        Returns:
            The task, or None if it does not fit.
        """
        if (task := self.engine.tasks.get(name)) is not None:
            return task
        if (config := self.served.get(name)) is None:
            raise UnknownTask(name, self.served)
        with TemporaryDirectory(prefix="revmux-adapters-") as downloads:
            adapters = self._fetched(config, Path(downloads))
            task = self._loaded(name, config, adapters, Path(downloads))
        self.engine.change([task])
        self.adapters[name] = adapters
        self._count(task)
        if not self._make_room(name, keep):
            return None
        self._report()
        for place, adapter in adapters.items():
            self._log_loss(name, place, adapter.source)
        return task

    def _make_room(self, name: str, keep: Collection[str]) -> bool:
        """Remove the tasks that were not used for longest until all fit into ``memory_gb``, see :meth:`_load`.

        Returns:
            Whether the task stays.
        """
        limit = self.config.memory_gb
        assert limit is not None
        while (size := self.memory.total / 1e9) > limit:
            others = [other for other in self.engine.tasks if other != name]
            if not others:
                logger.warning(
                    "task %r alone takes %.3g GB, more than memory_gb (%g); raise memory_gb", name, size, limit
                )
                break
            idle = [other for other in others if other not in keep]
            removed = min(idle, key=lambda other: self._last_use.get(other, -1)) if idle else name
            self.engine.change(remove=[removed])
            self.adapters.pop(removed, None)
            self.memory.remove(removed)
            if removed == name:
                return False
        return True

    def _fetched(self, task: TaskConfig, downloads: Path) -> FetchedAdapters:
        return fetch_adapters(task, downloads, self.config.max_multiplex)

    def _loaded(self, name: str, task: TaskConfig, adapters: FetchedAdapters, downloads: Path) -> Task:
        device = "cuda" if self.config.num_gpus else "cpu"
        return load_task(name, task, adapters, self.engine.limits, device, self._bases, downloads)

    def _log_loss(self, name: str, place: LineupPlace, source: str) -> None:
        task = self.engine.task(name)
        adapter = next(adapter for adapter in task.lineup.adapters if adapter.place == place)
        log_loss(adapter.config, source, task.threshold, self.config)

    def _report(self) -> None:
        if self.on_loaded is not None:
            self.on_loaded(list(self.engine.tasks))

    def _count(self, task: Task) -> None:
        """Count what a task keeps in memory, and log it."""
        kept = self.memory.add(task)
        logger.info("%s", describe_memory(task.name, kept, self.config.merge_limit_mib))

    def memory_lines(self) -> list[str]:
        """Return a line per loaded task about what it keeps in memory."""
        return [
            describe_memory(name, kept, self.config.merge_limit_mib) for name, kept in list(self.memory.added.items())
        ]


def _log_failure(name: str, error: Exception) -> None:
    logger.error("task %r cannot be loaded: %s: %s", name, type(error).__name__, without_passwords(str(error)))
