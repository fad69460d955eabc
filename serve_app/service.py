"""What the endpoints share: the engine with its tasks, the configuration, and the replica's figures. No Ray here."""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from prometheus_client.core import Metric

import revmux
from revmux.adapters.config import load_adapter_config, recorded_dtype, recorded_prompt
from revmux.errors import UserError
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.serving import Engine
from revmux.serving.scheduling import admits
from revmux.serving.task import Lineup, Task
from revmux.utils.redact import without_passwords
from serve_app.auth import read_tokens
from serve_app.config import AppConfig, TaskConfig, live_tasks
from serve_app.errors import Unhealthy
from serve_app.losses import log_loss
from serve_app.metrics import ReplicaMetrics
from serve_app.sources import fetch_adapter

logger = logging.getLogger(__name__)

PROBE_SECONDS = 15.0
"""How long a question about the model's health waits for an answer; a pass that runs is finished first."""

_FIXED = ("model", "revision", "dtype", "prompt", "max_length", "threshold")


class _Fetched(NamedTuple):
    """An adapter as the operator names it, and its local folder."""

    source: str
    folder: Path


class Service:
    """One replica's tasks, and what HTTP needs of them.

    Args:
        config: of the application. Its tasks are served by :meth:`serve`, not from the start.
        replica: the name of this replica.

    Attributes:
        peers: asks all replicas for their figures, by name; where it is None this one is alone.
        tokens: that open the server; none lets everyone in.
        update_error: why the last change of tasks was not taken.

    Raises:
        UserError: the tokens cannot be read.
    """

    def __init__(self, config: AppConfig, replica: str = "0") -> None:
        self.config = config
        self.replica = replica
        self.tokens = read_tokens(config.token_file, config.token_env)
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
        self._adapters: dict[str, dict[int, str]] = {}  # by task and N, what the operator calls them
        self._changing = threading.Lock()
        self.engine.start()

    def serve(self, tasks: Mapping[str, TaskConfig]) -> None:
        """Serve these tasks with these adapters from now on, without a pause.

        All that is new is loaded and checked before anything changes: after an error everything is as it was.

        Args:
            tasks: all of them by name.

        Raises:
            UserError: a model or adapter that does not fit, or another model under a name that is served.
        """
        with self._changing, TemporaryDirectory(prefix="revmux-adapters-") as downloads:
            wanted = {name: self._by_width(task, Path(downloads)) for name, task in tasks.items()}
            for name, task in tasks.items():
                if name in self._served:
                    self._check_same(name, task)
            added: list[Task] = []
            lineups: dict[str, Lineup] = {}
            for name, adapters in wanted.items():
                if name not in self._served:
                    added.append(self._loaded(name, tasks[name], adapters))
                    continue
                own = self._adapters[name]
                new = [adapter.folder for width, adapter in adapters.items() if own.get(width) != adapter.source]
                gone = own.keys() - adapters.keys()
                if new or gone:
                    lineups[name] = self.engine.task(name).lineup_with(new, gone)
            self.engine.change(added, lineups, self._served.keys() - tasks.keys())
            before = self._adapters
            self._served = dict(tasks)
            self._adapters = {
                name: {width: adapter.source for width, adapter in adapters.items()}
                for name, adapters in wanted.items()
            }
            for name, sources in self._adapters.items():
                for width, source in sources.items():
                    if before.get(name, {}).get(width) != source:
                        self._log_loss(name, width, source)

    def _by_width(self, task: TaskConfig, downloads: Path) -> dict[int, _Fetched]:
        """The adapters that may run, by their N."""
        found: dict[int, _Fetched] = {}
        most = self.config.max_multiplex
        for source in task.adapters:
            folder = fetch_adapter(source, downloads)
            width = load_adapter_config(folder).num_inputs
            if width in found:
                raise UserError(
                    f"adapters {found[width].source!r} and {source!r} both serve N = {width}; name one for each N"
                )
            if admits(most, width):
                found[width] = _Fetched(source, folder)
        return found

    def _check_same(self, name: str, task: TaskConfig) -> None:
        for setting in _FIXED:
            old, new = getattr(self._served[name], setting), getattr(task, setting)
            if old != new:
                raise UserError(
                    f"task {name!r} is served with {setting} {old!r}, not {new!r}; name the new one otherwise, "
                    "or deploy new replicas"
                )

    def _loaded(self, name: str, task: TaskConfig, adapters: dict[int, _Fetched]) -> Task:
        # Only inputs are cut to max_length, by the engine; loading just wants a legal one.
        folders = [adapter.folder for adapter in adapters.values()]
        prompt = task.prompt or recorded_prompt(folders)
        dtype = task.dtype or (recorded_dtype(load_adapter_config(folders[0])) if folders else "float32")
        backbone = BackboneConfig(task.model, task.revision, task.max_length or 2, dtype, prompt=prompt)
        pretrained = load_pretrained(backbone)
        pretrained.backbone.to("cuda" if self.config.num_gpus else "cpu")
        return Task(name, pretrained, folders, self.engine.limits, task.max_length, task.threshold)

    def _log_loss(self, name: str, width: int, source: str) -> None:
        task = self.engine.task(name)
        adapter = next(adapter for adapter in task.lineup.adapters if adapter.route.width == width)
        log_loss(adapter.config, source, task.threshold, self.config)

    def update(self, user_config: Any) -> None:
        """:meth:`serve` what is configured now. An error is logged and kept in ``update_error``, never raised.

        Ray stops a replica that fails to reconfigure, and every replica gets the same configuration.
        """
        try:
            self.serve(live_tasks(user_config))
        except UserError as error:
            self.update_error = without_passwords(str(error))
            logger.error("the tasks stay as they are: %s", self.update_error)
        except Exception as error:
            self.update_error = without_passwords(f"{type(error).__name__}: {error}")
            stack = without_passwords(traceback.format_exc())
            logger.error("the tasks stay as they are: the update failed\n%s", stack)
        else:
            self.update_error = None

    async def probe(self, task: str | None = None) -> None:
        """Ask the models, or one task's, a short text.

        An answer may take as long as the pass that runs before it. Until then a model is healthy as long as passes
        begin or end.

        Raises:
            Unhealthy: a wrong answer, or none from a model that has ended or has been silent for ``stuck_seconds``.
        """
        names = list(self.engine.tasks) if task is None else [task]
        if not names:
            raise Unhealthy("no task is loaded yet; ask again later")
        if not self.engine.alive:
            raise Unhealthy("the model's thread has ended")
        try:
            answers = [asyncio.wrap_future(self.engine.probe(name)) for name in names]
            # Shielded, for others may wait for the same answers.
            await asyncio.wait_for(asyncio.shield(asyncio.gather(*answers)), PROBE_SECONDS)
        except TimeoutError:
            if (silent := self.engine.silent_seconds) > self.config.stuck_seconds:
                raise Unhealthy(f"the model has neither begun nor ended a pass for {silent:.0f} s") from None
        except Exception as error:
            raise Unhealthy(f"the model does not answer: {error}") from error

    def close(self) -> None:
        """Answer what waits, and end."""
        self.engine.close()

    def info(self) -> dict[str, Any]:
        """What is served, with every limit."""
        engine, config = self.engine, self.config
        tasks = engine.tasks
        first = next(iter(tasks.values()), None)
        described = {name: self._task_info(task) for name, task in tasks.items()}
        return {
            # The first task under the names of text-embeddings-inference, which has one model.
            **(described[first.name] if first else {}),
            "tasks": described,
            "update_error": self.update_error,
            "max_multiplex": max((task.lineup.widest for task in tasks.values()), default=1),
            "max_concurrent_requests": config.max_queue,
            "max_queue": config.max_queue,
            "max_batch": config.max_batch,
            "max_batch_tokens": config.max_batch_tokens,
            "plain_load": config.plain_load,
            "priority_seconds": config.priority_seconds,
            "max_client_batch_size": config.max_texts,
            "max_body_bytes": config.max_body_bytes,
            "body_seconds": config.body_seconds,
            "stuck_seconds": config.stuck_seconds,
            "needs_token": bool(self.tokens),
            "num_replicas": config.num_replicas,
            "autoscaling": config.autoscaling.model_dump() if config.autoscaling else None,
            "threads": engine.threads,
            "replica": {"name": self.replica, **engine.stats()},
            "version": revmux.__version__,
            "versions": {package: version(package) for package in ("torch", "transformers", "ray")},
        }

    def _task_info(self, task: Task) -> dict[str, Any]:
        identity = task.pretrained.identity
        routes = task.lineup.routes
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
            "group_widths": sorted({route.width for route in routes}),
            "adapters": [
                {
                    "source": sources.get(adapter.config.num_inputs, adapter.folder),
                    "method": adapter.config.method,
                    "num_inputs": adapter.config.num_inputs,
                    "prefill_layers": adapter.config.prefill_layers,
                    "relative_cost": round(adapter.route.per_input, 4),
                    "threshold": task.lineup.thresholds.get(adapter.config.num_inputs, 0.0),
                    "used": adapter.route in routes,
                    "metrics": adapter.config.metrics,
                }
                for adapter in task.lineup.adapters
            ],
        }
