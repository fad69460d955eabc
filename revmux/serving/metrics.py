"""Counters of an engine's work, which a server exports in its own format."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

COUNTED = (
    "requests",  # admitted calls, each with one or more inputs
    "passes",
    "fell_back",
    "shared_prefill",  # inputs whose lower layers ran once, for another task too
    "joint_prefill",  # inputs whose lower layers ran in one batch for several tasks
    "tokens",
    "padded_tokens",
    "failed",
    "rejected",
    "expired",
    "cancelled",  # waiting inputs of requests that ended: the client disconnected, or another input failed
    "audited",  # inputs that an adapter and the plain model answered
    "agreed",  # audited inputs with the plain model's label
)


@dataclass(frozen=True)
class PassReport:
    """Report on what a task ran in a finished forward pass. Sequences have one entry per answered input, unless noted.

    Attributes:
        task: name of the task.
        widths: N of the last group that the input was in.
        groups: N of each group that was the last one of an input; one entry per group.
        methods: method of the last group that the input was in; ``siso`` is the plain model.
        answered_by: the stage of the ladder that answered; 0 is the plain model.
        fell_back: whether the input fell back to the plain model.
        shared_prefill: number of computed inputs whose lower layers another task of the same pass ran.
        joint_prefill: number of computed inputs whose lower layers ran in one batch for several tasks.
        cost: counted cost of the pass in inputs of the plain model, without layers that another task ran.
        tokens: total tokens of all computed inputs, without padding.
        padded_tokens: total tokens of all computed inputs, including padding.
        tokenize_seconds: time of tokenization.
        queue_seconds: time from queueing to the start of the pass.
        steps: seconds of the pass per step, see :mod:`revmux.serving.forward`.
        seconds: time of the whole pass.
    """

    task: str
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    methods: tuple[str, ...]
    answered_by: tuple[int, ...]
    fell_back: tuple[bool, ...]
    shared_prefill: int
    joint_prefill: int
    cost: float
    tokens: int
    padded_tokens: int
    tokenize_seconds: tuple[float, ...]
    queue_seconds: tuple[float, ...]
    steps: dict[str, float]
    seconds: float


@dataclass
class TaskCounts:
    """Counts of one task, or of all tasks together."""

    inputs: Counter[int] = field(default_factory=Counter)
    groups: Counter[int] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    ladder: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    cost: float = 0.0  # in inputs of the plain model
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: TaskCounts) -> None:
        """Add the counts of another task."""
        for own, more in ((self.inputs, other.inputs), (self.groups, other.groups)):
            own.update(more)
        self.methods.update(other.methods)
        self.ladder.update(other.ladder)
        self.counts.update(other.counts)
        self.cost += other.cost
        for step, seconds in other.seconds.items():
            self.seconds[step] += seconds

    def snapshot(self) -> dict[str, Any]:
        """Return the counts as plain dictionaries."""
        counted = {name: self.counts[name] for name in COUNTED}
        by_width = {"inputs": dict(self.inputs), "groups": dict(self.groups)}
        inputs = {**by_width, "methods": dict(self.methods), "ladder": dict(self.ladder)}
        return {**inputs, "seconds": dict(self.seconds), "cost": self.cost, **counted}


class Metrics:
    """Counts since the start, by task. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskCounts] = {}

    def _of(self, task: str) -> TaskCounts:
        return self._tasks.setdefault(task, TaskCounts())

    def add(self, task: str) -> None:
        """Start to count a task. Earlier counts under the same name are kept."""
        with self._lock:
            self._of(task)

    def count(self, task: str, name: str, amount: int = 1) -> None:
        """Increase one of the counters in :data:`COUNTED`."""
        with self._lock:
            self._of(task).counts[name] += amount

    def record(self, report: PassReport) -> None:
        """Count a forward pass."""
        with self._lock:
            own = self._of(report.task)
            own.inputs.update(report.widths)
            own.groups.update(report.groups)
            own.methods.update(report.methods)
            own.ladder.update(report.answered_by)
            own.counts.update(
                passes=1,
                fell_back=sum(report.fell_back),
                shared_prefill=report.shared_prefill,
                joint_prefill=report.joint_prefill,
                tokens=report.tokens,
                padded_tokens=report.padded_tokens,
            )
            own.cost += report.cost
            waits = {"tokenize": sum(report.tokenize_seconds), "queue": sum(report.queue_seconds)}
            for step, seconds in {**waits, **report.steps}.items():
                own.seconds[step] += seconds

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the counts: totals over all tasks, and the counts of each task under ``tasks``."""
        with self._lock:
            total = TaskCounts()
            for counts in self._tasks.values():
                total.add(counts)
            return {**total.snapshot(), "tasks": {name: counts.snapshot() for name, counts in self._tasks.items()}}
