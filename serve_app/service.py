"""The state that the endpoints share: the engine, the configuration and the metrics. Independent of Ray."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from prometheus_client.core import Metric

import revmux
from revmux.adapters.config import CONFIG_NAME, WEIGHTS_NAME, load_adapter_config, recorded_dtype, recorded_prompt
from revmux.errors import UserError
from revmux.estimate.peak import StorageCounter
from revmux.estimate.serving_memory import KeptMemory, kept_memory
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.serving import Engine
from revmux.serving.adapters import LineupPlace, admitted, check_stages, place_of
from revmux.serving.errors import UnknownTask
from revmux.serving.task import Lineup, Task
from revmux.utils.redact import without_passwords
from serve_app.auth import read_tokens
from serve_app.config import AppConfig, TaskConfig, live_tasks
from serve_app.errors import Unhealthy
from serve_app.kept_memory import describe_memory, memory_info
from serve_app.measured_loss import log_loss
from serve_app.metrics import ReplicaMetrics
from serve_app.sources import fetch_adapter
from serve_app.tracing import tracing_from_environment

logger = logging.getLogger(__name__)

PROBE_SECONDS = 15.0
"""How long a health check waits for the model's answer. A pass that is already running finishes first."""

_FIXED = ("model", "revision", "dtype", "prompt", "max_length", "threshold")


class _Fetched(NamedTuple):
    """An adapter: its name in the operator's configuration, its local folder, and a digest of its files."""

    source: str
    folder: Path
    digest: str


class Service:
    """The tasks of one replica, for the HTTP endpoints.

    Args:
        config: the application's configuration. Its tasks are not loaded until :meth:`serve` is called.
        replica: the name of this replica.

    Attributes:
        peers: collects the metrics of all replicas, by name; None if this is the only replica.
        tokens: accepted bearer tokens. If there are none, requests need no token.
        tracing: traces requests; None if the environment does not configure it.
        update_error: error of the last change of tasks, or None if it succeeded.

    Raises:
        UserError: the tokens cannot be read, or an exporter of traces is not installed.
    """

    def __init__(self, config: AppConfig, replica: str = "0") -> None:
        self.config = config
        self.replica = replica
        self.tokens = read_tokens(config.token_file, config.token_env)
        self.tracing = tracing_from_environment(replica)
        self.metrics = ReplicaMetrics(config.max_queue)
        self.engine = Engine(
            limits=config.limits(),
            threads=config.threads or max(1, int(config.num_cpus)),
            on_pass=self.metrics.on_pass,
        )
        self.metrics.engine = self.engine
        self.peers: Callable[[], Awaitable[dict[str, list[Metric]]]] | None = None
        self.update_error: str | None = None
        self._served: dict[str, TaskConfig] = {}
        self._memory: dict[str, KeptMemory] = {}
        self._adapters: dict[str, dict[LineupPlace, _Fetched]] = {}  # by task and place; the folders may be gone
        self._changing = threading.Lock()
        self._health_checks = itertools.count()
        self._loading: dict[str, asyncio.Future[Task | None]] = {}
        self._uses = itertools.count()
        self._last_use: dict[str, int] = {}  # by task
        self.engine.start()

    def serve(self, tasks: Mapping[str, TaskConfig]) -> None:
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
            requested = {name: self._by_place(task, Path(downloads)) for name, task in now.items()}
            for name in now:
                if name in loaded:
                    self._check_same(name, tasks[name])
            added: list[Task] = []
            lineups: dict[str, Lineup] = {}
            for name, adapters in requested.items():
                if name not in loaded:
                    added.append(self._loaded(name, tasks[name], adapters))
                    continue
                served = self._adapters[name]
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
            before = self._adapters
            self._served = dict(tasks)
            self._adapters = requested
            self._count_memory()
            for name, adapters in requested.items():
                for place, adapter in adapters.items():
                    known = before.get(name, {}).get(place)
                    if known is None or known.digest != adapter.digest:
                        self._log_loss(name, place, adapter.source)
        if self.config.memory_gb is not None:
            self._last_use = {name: use for name, use in self._last_use.items() if name in tasks}
            self._fill_memory()

    def _fill_memory(self) -> None:
        """Load tasks in their order until the next one does not fit, so that most first requests need not wait.

        Raises:
            UserError: not a single task can be loaded.
        """
        for name in self.task_names:
            if name in self.engine.tasks:
                continue
            try:
                if self._load(name, evict=False) is None:
                    return
            except UserError as error:
                if not self.engine.tasks:
                    raise
                logger.error("task %r cannot be loaded: %s", name, without_passwords(str(error)))

    @property
    def task_names(self) -> list[str]:
        """The names of all tasks, also of those that are not loaded."""
        return list(self._served)

    async def task(self, name: str | None = None) -> Task:
        """Return a task, after loading it if necessary; None is the only task.

        Raises:
            UnknownTask: there is no such task, or there are several and no name is given.
            Unhealthy: the task cannot be loaded.
        """
        if self.config.memory_gb is None:
            return self.engine.task(name)
        known = self._served
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
            UserError: they do not fit into memory together. Other errors are those of :meth:`task`.
        """
        known = self.engine.tasks if self.config.memory_gb is None else self._served
        for name in names:
            if name not in known:
                raise UnknownTask(name, known)
        found = [await self.task(name) for name in names]
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
            if (config := self._served.get(name)) is None:
                raise UnknownTask(name, self._served)
            adapters = self._by_place(config, Path(downloads))
            task = self._loaded(name, config, adapters)
            self.engine.change([task])
            self._adapters[name] = adapters
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
                self._adapters.pop(removed, None)
                if removed == name:
                    return None
            self._count_memory()
            for place, adapter in adapters.items():
                self._log_loss(name, place, adapter.source)
            return task

    def _count_memory(self) -> None:
        """Count what the tasks keep in memory, and log those that changed."""
        before, self._memory = self._memory, self._kept()
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
            for name, kept in self._memory.items()
            if kept != (before or {}).get(name)
        ]

    def _by_place(self, task: TaskConfig, downloads: Path) -> dict[LineupPlace, _Fetched]:
        """Fetch the adapters, and return those that ``max_multiplex`` allows by their place in the line-up."""
        folders = {source: fetch_adapter(source, downloads) for source in task.adapters}
        described = [(source, load_adapter_config(folders[source])) for source in task.adapters]
        check_stages(described, task.threshold)
        return {
            place_of(config): _Fetched(source, folders[source], _digest(folders[source]))
            for source, config in admitted(described, self.config.max_multiplex)
        }

    def _check_same(self, name: str, task: TaskConfig) -> None:
        for setting in _FIXED:
            old, new = getattr(self._served[name], setting), getattr(task, setting)
            if old != new:
                raise UserError(
                    f"task {name!r} is already served with {setting} {old!r}, not {new!r}; give the new task another "
                    "name, or deploy new replicas"
                )

    def _loaded(self, name: str, task: TaskConfig, adapters: dict[LineupPlace, _Fetched]) -> Task:
        # The engine applies max_length to inputs. Loading only needs a legal value.
        folders = [adapter.folder for adapter in adapters.values()]
        prompt = task.prompt or recorded_prompt(folders)
        dtype = task.dtype or (recorded_dtype(load_adapter_config(folders[0])) if folders else "float32")
        backbone = BackboneConfig(task.model, task.revision, task.max_length or 2, dtype, prompt=prompt)
        pretrained = load_pretrained(backbone)
        pretrained.backbone.to("cuda" if self.config.num_gpus else "cpu")
        return Task(name, pretrained, folders, self.engine.limits, task.max_length, task.threshold)

    def _log_loss(self, name: str, place: LineupPlace, source: str) -> None:
        task = self.engine.task(name)
        adapter = next(adapter for adapter in task.lineup.adapters if adapter.place == place)
        log_loss(adapter.config, source, task.threshold, self.config)

    def update(self, user_config: Any) -> None:
        """Call :meth:`serve` with the tasks of a new configuration. Errors are logged and kept in ``update_error``.

        They are not raised, because Ray stops a replica that fails to reconfigure, and all replicas get the same
        configuration.
        """
        try:
            self.serve(live_tasks(user_config))
        except UserError as error:
            self.update_error = without_passwords(str(error))
            logger.error("the update failed and the tasks remain unchanged: %s", self.update_error)
        except Exception as error:
            self.update_error = without_passwords(f"{type(error).__name__}: {error}")
            stack = without_passwords(traceback.format_exc())
            logger.error("the update failed and the tasks remain unchanged\n%s", stack)
        else:
            self.update_error = None

    async def probe(self, task: str | None = None) -> None:
        """Check that the model of one task answers a short text. Without a name, each call asks the next task.

        All tasks run on one device and in one thread, so the answer of any task shows that these work. It has to wait
        for the pass that is already running. If it does not arrive in time, the model still counts as healthy while
        passes begin or end.

        Raises:
            Unhealthy: no task is loaded, a model failed, the model's thread has ended, or no pass has begun or ended
                for ``stuck_seconds``.
        """
        name = self._next_task() if task is None else task
        if not self.engine.alive:
            raise Unhealthy("the model's thread has ended")
        try:
            # Shielded, because other health checks may wait for the same answer.
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self.engine.probe(name))), PROBE_SECONDS)
        except TimeoutError:
            if (silent := self.engine.silent_seconds) > self.config.stuck_seconds:
                raise Unhealthy(f"the model has neither begun nor ended a pass for {silent:.0f} s") from None
        except Exception as error:
            raise Unhealthy(f"the model of task {name!r} does not answer: {error}") from error

    def _next_task(self) -> str:
        """The task after the one that the last health check asked."""
        names = list(self.engine.tasks)
        if not names:
            raise Unhealthy("no task is loaded yet; retry later")
        return names[next(self._health_checks) % len(names)]

    def close(self) -> None:
        """Answer the waiting requests, stop the engine, and export the last traces."""
        self.engine.close()
        if self.tracing is not None:
            self.tracing.close()

    def info(self) -> dict[str, Any]:
        """Return the served tasks, their adapters, all limits, and the replica's counts."""
        engine, config = self.engine, self.config
        tasks = engine.tasks
        first = next(iter(tasks.values()), None)
        described = {name: self._task_info(task) for name, task in tasks.items()}
        return {
            # text-embeddings-inference has one model. Its keys describe the first task.
            **(described[first.name] if first else {}),
            "tasks": described,
            "not_loaded": [name for name in self._served if name not in tasks],
            "update_error": self.update_error,
            "max_multiplex": max((task.lineup.widest for task in tasks.values()), default=1),
            "max_concurrent_requests": config.max_queue,
            "max_queue": config.max_queue,
            "max_batch": config.max_batch,
            "max_batch_tokens": config.max_batch_tokens,
            "plain_load": config.plain_load,
            "merge_limit_mib": config.merge_limit_mib,
            "priority_seconds": config.priority_seconds,
            "max_client_batch_size": config.max_texts,
            "max_body_bytes": config.max_body_bytes,
            "body_seconds": config.body_seconds,
            "stuck_seconds": config.stuck_seconds,
            "memory_gb": config.memory_gb,
            "needs_token": bool(self.tokens),
            "num_replicas": config.num_replicas,
            "autoscaling": config.autoscaling.model_dump() if config.autoscaling else None,
            "threads": engine.threads,
            "replica": {"name": self.replica, "cpu_seconds": engine.cpu_seconds, **engine.stats()},
            "version": revmux.__version__,
            "versions": {package: version(package) for package in ("torch", "transformers", "ray")},
        }

    def _task_info(self, task: Task) -> dict[str, Any]:
        identity = task.pretrained.identity
        lineup = task.lineup
        sources = self._adapters.get(task.name, {})
        return {
            "model_id": identity["name"],
            "model_sha": identity["revision"],
            "model_sha256": identity["sha256"],
            "model_dtype": str(task.backbone.dtype).removeprefix("torch."),
            "device": str(task.backbone.device),
            "model_type": {"classifier": {"id2label": dict(enumerate(task.label_names))}},
            "num_layers": task.backbone.num_layers,
            "max_input_length": task.max_length,
            "group_widths": sorted({route.width for route in lineup.routes}),
            "memory": memory_info(self._memory[task.name]) if task.name in self._memory else None,
            "adapters": [
                {
                    "source": without_passwords(
                        sources[adapter.place].source if adapter.place in sources else str(adapter.folder)
                    ),
                    "stage": adapter.config.stage,
                    "method": adapter.config.method,
                    "num_inputs": adapter.config.num_inputs,
                    "prefill_layers": adapter.config.prefill_layers,
                    "relative_cost": round(lineup.route(adapter).per_input, 4),
                    "threshold": adapter.threshold,
                    "used": lineup.uses(adapter),
                    "metrics": {
                        name: value if math.isfinite(value) else None for name, value in adapter.config.metrics.items()
                    },
                }
                for adapter in lineup.adapters
            ],
        }


def _digest(folder: Path) -> str:
    """A digest of the files of an adapter."""
    found = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with suppress(FileNotFoundError), (folder / name).open("rb") as file:  # loading reports a missing file
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
