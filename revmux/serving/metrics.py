"""What an engine has done, counted; a server exports it in whatever form it likes."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

COUNTED = (
    "requests",  # calls that were admitted, each of one or more inputs
    "passes",
    "fell_back",
    "tokens",
    "padded_tokens",
    "failed",
    "rejected",
    "expired",
    "cancelled",
)


@dataclass(frozen=True)
class PassReport:
    """One forward pass that has run, for histograms; sequences have one entry per input that it answered.

    Attributes:
        task: its name.
        widths: N of the group that each input rode in.
        groups: N of each group that was answered.
        methods: that each input rode with; ``siso`` is the plain model.
        fell_back: which inputs resumed alone.
        tokens: of all inputs that were computed.
        padded_tokens: that the layers below the cut really got.
        tokenize_seconds: from text to tokens.
        queue_seconds: from being queued to the start of the pass.
        stages: seconds of the pass by stage, see :mod:`revmux.serving.forward`.
        seconds: of the whole pass.
    """

    task: str
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    methods: tuple[str, ...]
    fell_back: tuple[bool, ...]
    tokens: int
    padded_tokens: int
    tokenize_seconds: tuple[float, ...]
    queue_seconds: tuple[float, ...]
    stages: dict[str, float]
    seconds: float


@dataclass
class TaskCounts:
    """Sums over one task, or over all."""

    inputs: Counter[int] = field(default_factory=Counter)
    groups: Counter[int] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: TaskCounts) -> None:
        """Take the sums of another task in."""
        for own, more in ((self.inputs, other.inputs), (self.groups, other.groups)):
            own.update(more)
        self.methods.update(other.methods)
        self.counts.update(other.counts)
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds

    def snapshot(self) -> dict[str, Any]:
        """Plain data."""
        counted = {name: self.counts[name] for name in COUNTED}
        by_width = {"inputs": dict(self.inputs), "groups": dict(self.groups)}
        return {**by_width, "methods": dict(self.methods), "seconds": dict(self.seconds), **counted}


class Metrics:
    """Counts since the start, written by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskCounts] = {}

    def _of(self, task: str) -> TaskCounts:
        return self._tasks.setdefault(task, TaskCounts())

    def add(self, task: str) -> None:
        """Count a task from now on; what was counted under its name before is kept."""
        with self._lock:
            self._of(task)

    def count(self, task: str, name: str, amount: int = 1) -> None:
        """Add to one of :data:`COUNTED`."""
        with self._lock:
            self._of(task).counts[name] += amount

    def record(self, report: PassReport) -> None:
        """Add a pass."""
        with self._lock:
            own = self._of(report.task)
            own.inputs.update(report.widths)
            own.groups.update(report.groups)
            own.methods.update(report.methods)
            own.counts.update(
                passes=1, fell_back=sum(report.fell_back), tokens=report.tokens, padded_tokens=report.padded_tokens
            )
            waits = {"tokenize": sum(report.tokenize_seconds), "queue": sum(report.queue_seconds)}
            for stage, seconds in {**waits, **report.stages}.items():
                own.seconds[stage] += seconds

    def snapshot(self) -> dict[str, Any]:
        """All sums over the tasks, and those of each under ``tasks``; plain data of the caller's own."""
        with self._lock:
            total = TaskCounts()
            for counts in self._tasks.values():
                total.add(counts)
            return {**total.snapshot(), "tasks": {name: counts.snapshot() for name, counts in self._tasks.items()}}
