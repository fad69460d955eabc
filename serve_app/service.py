"""The state that the endpoints share: the engine, the configuration and the metrics. Independent of Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from prometheus_client.core import Metric

import revmux
from revmux.errors import UserError
from revmux.serving import Engine, UnknownTask
from revmux.serving.task import Task
from revmux.text import Text
from revmux.utils.redact import without_passwords
from serve_app.auth import read_tokens
from serve_app.backend import TaskAnswers, TaskNames
from serve_app.config import AppConfig, TaskConfig, live_tasks
from serve_app.errors import Unhealthy
from serve_app.kept_memory import memory_info
from serve_app.metrics import ReplicaMetrics
from serve_app.protocol import RequestOptions
from serve_app.tasks import ServedTasks
from serve_app.tracing import tracing_from_environment

logger = logging.getLogger(__name__)

PROBE_SECONDS = 15.0
"""How long a health check waits for the model's answer. A pass that is already running finishes first."""


class Service:
    """What one replica shares among its HTTP endpoints.

    Args:
        config: the application's configuration. Its tasks are not loaded until :meth:`serve` is called.
        replica: the name of this replica.

    Attributes:
        tasks: the served tasks.
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
        self.tasks = ServedTasks(config, self.engine)
        self.peers: Callable[[], Awaitable[dict[str, list[Metric]]]] | None = None
        self.update_error: str | None = None
        self._health_checks = itertools.count()
        self.engine.start()

    def serve(self, tasks: Mapping[str, TaskConfig]) -> None:
        """Change the served tasks and adapters to these, see :meth:`serve_app.tasks.ServedTasks.change`."""
        self.tasks.change(tasks)

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

    @property
    def task_names(self) -> list[str]:
        """The names of all tasks, also of those that are not loaded."""
        return self.tasks.names

    async def classify(self, names: TaskNames, texts: Sequence[Text], options: RequestOptions) -> list[TaskAnswers]:
        """Classify texts, after loading the tasks if necessary, see :meth:`serve_app.backend.Backend.classify`."""
        names = self.tasks.names if names == "*" else names
        if not names:
            raise UnknownTask(None, ())
        # Found once, because tasks can be added, removed and replaced before the answers are ready.
        tasks = await self.tasks.several(names)
        found = await self.engine.answer_tasks(
            texts,
            tasks,
            bool(options.truncate),
            options.max_multiplex,
            priority=options.priority or 0,
            timeout=None if options.timeout_ms is None else options.timeout_ms / 1000,
        )
        return [TaskAnswers(task.name, task.label_names, answers) for task, answers in zip(tasks, found)]

    async def label_names(self, task: str) -> Sequence[str]:
        """Return the labels of a task, after loading it if necessary."""
        [found] = await self.tasks.several([task])
        return found.label_names

    async def describe(self) -> dict[str, Any]:
        """Return :meth:`info`."""
        return self.info()

    async def probe(self, task: str | None = None) -> None:
        """Check that the model of one task answers a short text. Without a name, each call asks the next task.

        All tasks run on one device and in one thread, so the answer of any task shows that these work. It has to wait
        for the pass that is already running. If it does not arrive in time, the model still counts as healthy while
        passes begin or end.

        Raises:
            UnknownTask: there is no such task.
            Unhealthy: no task is loaded, the task cannot be loaded, a model failed, the model's thread has ended, or no pass has begun or ended
                for ``stuck_seconds``.
        """
        name = self._next_task() if task is None else (await self.tasks.get(task)).name
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
            "not_loaded": self.tasks.not_loaded,
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
            "memory_used_gb": self.tasks.memory.total / 1e9,
            "needs_token": bool(self.tokens),
            "num_replicas": config.num_replicas,
            "front_ends": config.front_ends,
            "autoscaling": config.autoscaling.model_dump() if config.autoscaling else None,
            "threads": engine.threads,
            "replica": {"name": self.replica, "cpu_seconds": engine.cpu_seconds, **engine.stats()},
            "version": revmux.__version__,
            "versions": {package: version(package) for package in ("torch", "transformers", "ray")},
        }

    def _task_info(self, task: Task) -> dict[str, Any]:
        identity = task.pretrained.identity
        lineup = task.lineup
        sources = self.tasks.adapters.get(task.name, {})
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
            "memory": memory_info(kept) if (kept := self.tasks.memory.added.get(task.name)) else None,
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
                    "confidence": "plain" if adapter.config.deferral is None else "learned",
                    "used": lineup.uses(adapter),
                    "metrics": {
                        name: value if math.isfinite(value) else None for name, value in adapter.config.metrics.items()
                    },
                }
                for adapter in lineup.adapters
            ],
        }
