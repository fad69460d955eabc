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


Classify = Callable[[Sequence[Text], RequestOptions], Awaitable[list[TaskAnswers]]]
"""Classifies texts with each of the tasks that :meth:`Backend.find` found, in their order."""


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

    async def find(self, names: TaskNames) -> Classify:
        """Find tasks. Those that are changed or removed afterwards still classify what is asked.

        Raises:
            UnknownTask: there is no task of one of the names, or no name is given and there are several.
            UserError: the tasks do not fit into memory together.
            Unhealthy: one of the tasks cannot be loaded.
        """

    async def label_names(self, task: str) -> Sequence[str]:
        """Return the labels of a task.

        Raises:
            UnknownTask, Unhealthy: as :meth:`find`.
        """

    async def probe(self, task: str | None = None) -> None:
        """Check that the model of one task answers a short text. Without a name, each call asks the next task.

        Raises:
            UnknownTask: there is no such task.
            Unhealthy: it does not answer.
        """

    async def describe(self) -> dict[str, Any]:
        """Return the served tasks, their adapters, all limits, and counts."""
