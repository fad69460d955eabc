"""The state of a running job: what is left, what was found, and how fast it goes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from revmux.bulk.audit import Agreement
from revmux.bulk.output import UnitRecord
from revmux.bulk.price import JobPrice, job_price
from revmux.bulk.units import Unit
from revmux.estimate.price import SECONDS_PER_HOUR


@dataclass(frozen=True)
class FailedUnit:
    """A unit that was left out.

    Attributes:
        unit: the unit.
        error: its last error on one line.
    """

    unit: Unit
    error: str


@dataclass
class Totals:
    """Sums over finished units.

    Attributes:
        rows: rows.
        errors: bad rows.
        truncated: truncated inputs.
        cost: counted cost of the answers; 1 is one input in the plain model.
        audit_cost: counted cost of the audit.
        labels: rows by label.
        confidence: rows by confidence.
        answered_by: rows by stage, method and width.
        agreement: the audit.
        sample: sampled rows.
    """

    rows: int = 0
    errors: int = 0
    truncated: int = 0
    cost: float = 0.0
    audit_cost: float = 0.0
    labels: Counter[str] = field(default_factory=Counter)
    confidence: list[int] = field(default_factory=list)
    answered_by: Counter[str] = field(default_factory=Counter)
    agreement: Agreement = field(default_factory=Agreement)
    sample: list[dict[str, Any]] = field(default_factory=list)

    def add(self, record: UnitRecord) -> None:
        """Add a finished unit."""
        self.rows += record.rows
        self.errors += record.errors
        self.truncated += record.truncated
        self.cost += record.cost
        self.audit_cost += record.audit_cost
        self.labels.update(record.labels)
        before = self.confidence or [0] * len(record.confidence)
        self.confidence = [sum(pair) for pair in zip(before, record.confidence)]
        self.answered_by.update(record.answered_by)
        self.agreement += Agreement(record.audited, record.agreed)
        self.sample += record.sample

    @property
    def relative_cost(self) -> float:
        """Counted cost per answered row, relative to the plain model; 1 if no row was answered."""
        return self._relative(self.cost)

    @property
    def relative_cost_with_audit(self) -> float:
        """As :attr:`relative_cost`, with the cost of the audit."""
        return self._relative(self.cost + self.audit_cost)

    def _relative(self, cost: float) -> float:
        answered = self.rows - self.errors
        return cost / answered if answered else 1.0


class Progress:
    """The state of a job on its driver.

    Args:
        units: all units.
        finished: records of units that an earlier run finished.
        attempts: how often a unit may fail.
        price_per_hour: price of an hour of a worker's hardware, in any currency; None computes no prices.
        worker_seconds: time of the workers of earlier runs.

    Attributes:
        records: records of the finished units, by number.
        pending: units that no worker has.
        failed: units that were left out.
        resumed: number of units that an earlier run finished.
        worker_seconds: time of all workers, those of earlier runs included.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        finished: Mapping[int, UnitRecord],
        attempts: int,
        price_per_hour: float | None = None,
        worker_seconds: float = 0.0,
    ) -> None:
        self.units = units
        self.records = dict(finished)
        self.pending = deque(unit for unit in units if unit.number not in finished)
        self.failed: list[FailedUnit] = []
        self.resumed = len(finished)
        self.totals = Totals()
        self.worker_seconds = worker_seconds
        self._price_per_hour = price_per_hour
        self._charged = perf_counter()
        self._attempts = attempts
        self._failures: Counter[int] = Counter()
        self._rows = sum(unit.rows for unit in units)
        self._started = perf_counter()
        self._rows_before = 0
        self._device_seconds = 0.0
        for number in sorted(finished):
            self.totals.add(finished[number])
        self._rows_before = self.totals.rows

    def start(self) -> None:
        """Start the clock by which rates are computed, once a model is loaded."""
        self._started = perf_counter()

    def charge(self, workers: int) -> None:
        """Add the time since the last call to that of the workers.

        Args:
            workers: number of workers that have had their hardware since then.
        """
        now = perf_counter()
        self.worker_seconds += workers * (now - self._charged)
        self._charged = now

    @property
    def price(self) -> JobPrice | None:
        """The price of the rows so far; None without the price of an hour, or before the first row."""
        if self._price_per_hour is None or not self.totals.rows or not self.worker_seconds:
            return None
        return job_price(
            self.totals.rows, self.worker_seconds, self._price_per_hour, self.totals.relative_cost_with_audit
        )

    @property
    def is_done(self) -> bool:
        """Whether every unit is finished or left out."""
        return len(self.records) + len(self.failed) == len(self.units)

    def finish(self, number: int, record: UnitRecord, device_seconds: float) -> None:
        """Record a finished unit."""
        if number in self.records:
            return
        self.records[number] = record
        self.totals.add(record)
        self._device_seconds += device_seconds

    def fail(self, unit: Unit, error: str) -> bool:
        """Record a failed attempt; returns whether the unit will be tried again, after all others."""
        self._failures[unit.number] += 1
        if self._failures[unit.number] >= self._attempts:
            self.failed.append(FailedUnit(unit, error))
            return False
        self.pending.append(unit)
        return True

    def metrics(self, workers: int) -> dict[str, float]:
        """Figures of the job so far, for a tracker.

        Args:
            workers: number of workers that have a model, by which the share of busy time is computed.
        """
        seconds = max(perf_counter() - self._started, 1e-9)
        rate = (self.totals.rows - self._rows_before) / seconds
        left = self._rows - self.totals.rows - sum(one.unit.rows for one in self.failed)
        figures = {
            "rows": float(self.totals.rows),
            "rows_per_second": rate,
            "share_done": self.totals.rows / self._rows,
            "seconds_left": left / rate if rate else float("inf"),
            "cost": self.totals.relative_cost,
            "device_busy": min(1.0, self._device_seconds / (seconds * max(1, workers))),
            "bad_rows": float(self.totals.errors),
            "failed_units": float(len(self.failed)),
            "worker_hours": self.worker_seconds / SECONDS_PER_HOUR,
        }
        if price := self.price:
            figures |= {"price": price.so_far, "price_per_million": price.per_million, "plain_price": price.plain}
        if self.totals.agreement.rows:
            low, high = self.totals.agreement.interval()
            figures |= {"agreement": self.totals.agreement.share, "agreement_low": low, "agreement_high": high}
        return figures

    def line(self, workers: int) -> str:
        """The state on one line."""
        figures = self.metrics(workers)
        parts = [
            f"{self.totals.rows:,} of {self._rows:,} rows ({figures['share_done']:.1%})",
            f"{figures['rows_per_second']:,.0f} rows/s",
            f"{duration(figures['seconds_left'])} left",
            f"cost {figures['cost']:.2f} of the plain model",
            f"device busy {figures['device_busy']:.0%}",
        ]
        if price := self.price:
            parts.append(str(price))
        if self.totals.errors:
            parts.append(f"{self.totals.errors:,} bad rows")
        if self.failed:
            parts.append(f"{len(self.failed):,} failed units")
        if self.totals.agreement.rows:
            parts.append(f"agreement {self.totals.agreement}")
        return ", ".join(parts)


class Reporter:
    """Calls a function with the progress at most once per interval, and on request.

    Args:
        on_progress: called with the progress.
        interval: seconds between two calls.
    """

    def __init__(self, on_progress: Callable[[Progress], None], interval: float = 10.0) -> None:
        self._on_progress = on_progress
        self._interval = interval
        self._last = perf_counter()

    def __call__(self, progress: Progress) -> None:
        """Report if the interval has passed, or the job is done."""
        if progress.is_done or perf_counter() - self._last >= self._interval:
            self._last = perf_counter()
            self._on_progress(progress)


def duration(seconds: float) -> str:
    """A duration as text, such as ``3 min`` or ``1.5 h``."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
