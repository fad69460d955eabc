"""What Prometheus reads: the figures of every replica on one page, each labelled with its replica.

A scrape reaches whichever replica Serve picks, so the one that is asked collects from all the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from revmux.serving import Engine
from revmux.serving.metrics import PassReport

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COUNTERS = {
    "requests": "requests that were taken",
    "fell_back": "inputs whose group was not sure enough, so that they resumed alone",
    "failed": "inputs whose forward pass failed",
    "rejected": "inputs that found no room in the queue",
    "expired": "inputs whose deadline passed in the queue",
    "cancelled": "inputs whose client hung up while they waited",
    "passes": "forward passes",
    "tokens": "tokens that were computed, padding not counted",
    "padded_tokens": "tokens that were computed, padding counted",
}


class ReplicaMetrics:
    """The figures of one replica.

    Args:
        max_queue: its limit, shown beside the queue's depth.
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
            "from the first byte of a request to the last of its reply",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "revmux_stage_seconds",
            "tokenize and queue an input, the other stages a forward pass",
            ["task", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def on_pass(self, report: PassReport) -> None:
        """What the engine calls after each forward pass."""
        waits = {"tokenize": report.tokenize_seconds, "queue": report.queue_seconds, "pass": (report.seconds,)}
        stages = {stage: (seconds,) for stage, seconds in report.stages.items()}
        for stage, observed in {**waits, **stages}.items():
            histogram = self.stages.labels(report.task, stage)
            for seconds in observed:
                histogram.observe(seconds)

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the tasks are not known yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The engine's counts as Prometheus has them."""
        if self.engine is None:
            return
        tasks = self.engine.stats()["tasks"]
        queue = GaugeMetricFamily("revmux_queue_inputs", "inputs that wait now", labels=["task"])
        limit = GaugeMetricFamily("revmux_queue_limit", "inputs of a task that may wait", value=self.max_queue)
        counters = {
            name: CounterMetricFamily(f"revmux_{name}", help_text, labels=["task"])
            for name, help_text in _COUNTERS.items()
        }
        inputs = CounterMetricFamily(
            "revmux_inputs", "inputs by the width of the group that they rode in", labels=["task", "width"]
        )
        groups = CounterMetricFamily(
            "revmux_groups", "groups, which are executions, by width", labels=["task", "width"]
        )
        methods = CounterMetricFamily(
            "revmux_method_inputs",
            "inputs by the method that they rode with; siso is the plain model",
            labels=["task", "method"],
        )
        widths = HistogramMetricFamily("revmux_group_width", "width of the groups", labels=["task"])
        for task, counted in tasks.items():
            queue.add_metric([task], counted["waiting"])
            for name, family in counters.items():
                family.add_metric([task], counted[name])
            for width, number in sorted(counted["inputs"].items()):
                inputs.add_metric([task, str(width)], number)
            for method, number in sorted(counted["methods"].items()):
                methods.add_metric([task, method], number)
            for width, number in sorted(counted["groups"].items()):
                groups.add_metric([task, str(width)], number)
            widths.add_metric([task], *_histogram(counted["groups"]))
        yield from (queue, limit, *counters.values(), inputs, groups, methods, widths)

    def families(self) -> list[Metric]:
        """All figures, to be sent to the replica that was asked."""
        return list(self.registry.collect())


def _histogram(groups: dict[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulated buckets, and the sum of the widths."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for width in sorted({1, 2, 4, 8, 16, *groups}):
        total += groups.get(width, 0)
        buckets.append((str(float(width)), total))
    return [*buckets, ("+Inf", total)], sum(width * number for width, number in groups.items())


class _Merged:
    """Metric families of several replicas as one page."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def page(by_replica: dict[str, list[Metric]]) -> bytes:
    """The page in Prometheus's text format.

    Args:
        by_replica: what :meth:`ReplicaMetrics.families` gave on each replica, by the replica's name.
    """
    merged: dict[str, Metric] = {}
    for replica, families in sorted(by_replica.items()):
        for family in families:
            whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                if sample.name.endswith("_created"):  # when a series began: as many lines again, and nobody asks
                    continue
                labels: dict[str, Any] = {**sample.labels, "replica": replica}
                whole.add_sample(sample.name, labels, sample.value)
    return generate_latest(_Merged(merged.values()))
