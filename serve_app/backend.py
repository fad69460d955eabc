"""What the HTTP endpoints of a replica ask for: classifications, health, and descriptions of what is served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from prometheus_client.core import Metric

from revmux.serving import Answer
from revmux.text import Text
from serve_app.config import AppConfig
from serve_app.metrics import ReplicaMetrics
from serve_app.protocol import RequestOptions
from serve_app.tracing import Tracing

TaskNames = Sequence[str | None] | Literal["*"]
"""Different names of tasks, ``"*"`` for all tasks, or None in place of a name for the only task."""


class TaskAnswers(NamedTuple):
    """The answers of one task.

    Attributes:
        task: name of the task.
        label_names: its labels, in the order of the scores.
        answers: one per text.
    """

    task: str
    label_names: Sequence[str]
    answers: list[Answer]


class Backend(Protocol):
    """Answers the endpoints: :class:`serve_app.service.Service` in this process.

    Attributes:
        config: the application's configuration.
        replica: the name of this replica.
        tokens: accepted bearer tokens. If there are none, requests need no token.
        tracing: traces requests; None if the environment does not configure it.
        metrics: counts the replies.
        peers: collects the metrics of all replicas, by name; None if this is the only replica.
    """

    config: AppConfig
    replica: str
    tokens: tuple[bytes, ...]
    tracing: Tracing | None
    metrics: ReplicaMetrics
    peers: Callable[[], Awaitable[dict[str, list[Metric]]]] | None

    @property
    def task_names(self) -> list[str]:
        """The names of all tasks, also of those that are not loaded."""

    async def classify(self, names: TaskNames, texts: Sequence[Text], options: RequestOptions) -> list[TaskAnswers]:
        """Classify texts with each of the tasks, in their order. The tasks may be changed or removed meanwhile.

        Raises:
            UnknownTask: there is no task of one of the names, or no name is given and there are several.
            UserError: the tasks do not fit into memory together.
            Unhealthy: one of the tasks cannot be loaded.
            Other errors: see :meth:`revmux.serving.Engine.answer_tasks`.
        """

    async def label_names(self, task: str) -> Sequence[str]:
        """Return the labels of a task.

        Raises:
            UnknownTask, Unhealthy: as :meth:`classify`.
        """

    async def probe(self, task: str | None = None) -> None:
        """Check that the model of one task answers a short text. Without a name, each call asks the next task.

        Raises:
            UnknownTask: there is no such task.
            Unhealthy: it does not answer.
        """

    async def describe(self) -> dict[str, Any]:
        """Return the served tasks, their adapters, all limits, and counts."""
