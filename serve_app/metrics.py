"""Metrics for Prometheus: one page with the metrics of every replica, each labeled with its replica.

Serve routes a scrape to one replica, which collects the metrics of all others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.samples import Sample
from starlette.types import Message, Send

from revmux.serving.metrics import PassReport

if TYPE_CHECKING:  # a front end has none
    from revmux.serving import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Bounds of the widths of groups. Prometheus can only add histograms with the same bounds."""
_COUNTERS = {
    "requests": "admitted requests",
    "fell_back": "inputs that fell back to the plain model because the confidence was below the threshold",
    "shared_prefill": "inputs whose lower layers ran for another task of the same pass",
    "joint_prefill": "inputs whose lower layers ran in one batch for several tasks",
    "cost": "counted cost of the forward passes, in inputs of the plain model",
    "failed": "inputs whose forward pass failed",
    "rejected": "inputs refused because the queue was full",
    "expired": "inputs whose deadline passed in the queue",
    "cancelled": "waiting inputs of requests whose client disconnected, or of which another input failed",
    "audited": "inputs of adapters that ran through the plain model too, see the setting audit",
    "agreed": "audited inputs with the plain model's label",
    "passes": "forward passes",
    "tokens": "computed tokens, without padding",
    "padded_tokens": "computed tokens, including padding",
}


class ReplicaMetrics:
    """The metrics of one replica.

    Args:
        max_queue: limit of the queue, exported as a metric.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.engine: Engine | None = None
        self.registry = CollectorRegistry()
        self.replies = Counter(
            "revmux_http_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "revmux_http_request_seconds",
            "seconds from the first byte of a request to the last byte of its reply",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._steps: dict[tuple[str, str], _Seconds] = {}
        self._replies: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self.registry.register(self)

    @contextmanager
    def measured(self, send: Send, route: Callable[[], str]) -> Iterator[Send]:
        """Count and time the reply that is sent inside the context with the function that it yields.

        Args:
            send: sends the messages of the reply.
            route: returns the pattern of the path, once the reply is complete.
        """
        started, status = perf_counter(), 0

        async def measured_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            yield measured_send
        except Exception:
            status = status or 500  # which FastAPI sends after this context
            raise
        finally:
            self.replied(route(), str(status or "dropped"), perf_counter() - started)

    def replied(self, route: str, status: str, seconds: float) -> None:
        """Record a reply.

        Args:
            route: the pattern of the request's path.
            status: HTTP status, or ``dropped``.
            seconds: time of the request.
        """
        known = self._replies.get((route, status))
        if known is None:
            known = self._replies[route, status] = self.replies.labels(route, status), self.seconds.labels(route)
        counter, histogram = known
        counter.inc()
        histogram.observe(seconds)

    def on_pass(self, report: PassReport) -> None:
        """Record a forward pass. The engine calls this after each pass."""
        waits = {"tokenize": report.tokenize_seconds, "queue": report.queue_seconds, "pass": (report.seconds,)}
        steps = {step: (seconds,) for step, seconds in report.steps.items()}
        for step, observed in {**waits, **steps}.items():
            self._steps.setdefault((report.task, step), _Seconds()).observe(observed)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: prometheus_client calls this on registration, when the tasks are not known yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's counts as metric families."""
        if self.engine is None:
            return
        tasks = self.engine.stats()["tasks"]
        queue = GaugeMetricFamily("revmux_queue_inputs", "inputs that are waiting", labels=["task"])
        limit = GaugeMetricFamily("revmux_queue_limit", "maximum waiting inputs per task", value=self.max_queue)
        counters = {
            name: CounterMetricFamily(f"revmux_{name}", help_text, labels=["task"])
            for name, help_text in _COUNTERS.items()
        }
        inputs = CounterMetricFamily(
            "revmux_inputs", "answered inputs by the width of their group", labels=["task", "width"]
        )
        groups = CounterMetricFamily(
            "revmux_groups", "groups that were the last one of an answered input, by width", labels=["task", "width"]
        )
        methods = CounterMetricFamily(
            "revmux_method_inputs",
            "answered inputs by method; siso is the plain model",
            labels=["task", "method"],
        )
        ladder = CounterMetricFamily(
            "revmux_ladder_inputs",
            "answered inputs by the stage of the ladder that answered; 0 is the plain model",
            labels=["task", "stage"],
        )
        widths = HistogramMetricFamily(
            "revmux_group_width", "width of the groups that were the last one of an answered input", labels=["task"]
        )
        for task, counted in tasks.items():
            queue.add_metric([task], counted["waiting"])
            for name, family in counters.items():
                family.add_metric([task], counted[name])
            for width, number in sorted(counted["inputs"].items()):
                inputs.add_metric([task, str(width)], number)
            for method, number in sorted(counted["methods"].items()):
                methods.add_metric([task, method], number)
            for stage, number in sorted(counted["ladder"].items()):
                ladder.add_metric([task, str(stage)], number)
            for width, number in sorted(counted["groups"].items()):
                groups.add_metric([task, str(width)], number)
            widths.add_metric([task], *_histogram(counted["groups"]))
        yield from (queue, limit, *counters.values(), inputs, groups, methods, ladder, widths, self._step_seconds())

    def _step_seconds(self) -> Metric:
        family = HistogramMetricFamily(
            "revmux_step_seconds",
            "seconds per input for the steps tokenize and queue, seconds per forward pass for the other steps",
            labels=["task", "step"],
        )
        for (task, step), seconds in list(self._steps.items()):
            family.add_metric([task, step], *seconds.buckets())
        return family

    def families(self) -> list[Metric]:
        """Return all metrics in a form that can be sent to another replica."""
        return list(self.registry.collect())


class _Seconds:
    """A histogram that records all inputs of a pass at once. One thread observes, others may read."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: Sequence[float]) -> None:
        for one in seconds:
            self._counts[bisect_left(SECONDS, one)] += 1
        self._sum += sum(seconds)

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """The cumulative buckets, and the sum."""
        bounds = [*map(str, SECONDS), "+Inf"]
        return list(zip(bounds, accumulate(self._counts))), self._sum


def _histogram(groups: dict[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets and the sum of the widths."""
    bounds = [*map(float, WIDTHS), float("inf")]
    buckets: list[float] = [sum(number for width, number in groups.items() if width <= bound) for bound in bounds]
    names = [*(str(bound) for bound in bounds[:-1]), "+Inf"]
    return list(zip(names, buckets)), sum(width * number for width, number in groups.items())


class _Merged:
    """A collector of given metric families."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def samples(family: Metric) -> Iterator[Sample]:
    """Yield the samples of a metric without the start times of its series, which would double their number."""
    return (sample for sample in family.samples if not sample.name.endswith("_created"))


def page(by_replica: dict[str, list[Metric]]) -> bytes:
    """Return the metrics of all replicas in Prometheus's text format.

    Args:
        by_replica: result of :meth:`ReplicaMetrics.families` by name of the replica.
    """
    merged: dict[str, Metric] = {}
    for replica, families in sorted(by_replica.items()):
        for family in families:
            combined = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in samples(family):
                labels: dict[str, Any] = {**sample.labels, "replica": replica}
                combined.add_sample(sample.name, labels, sample.value)
    return generate_latest(_Merged(merged.values()))
