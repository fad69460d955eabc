"""The metrics of a replica through Ray's metrics agents, for a Prometheus server that scrapes Ray's nodes.

Every series of ``/metrics`` has one here, with the prefix ``ray_`` and Serve's labels ``application``, ``deployment`` and
``replica``. Names, help texts and values come from :class:`serve_app.metrics.ReplicaMetrics`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from prometheus_client.core import Metric
from ray.serve.metrics import Gauge

from serve_app.metrics import samples

EXPORT_SECONDS = 5.0
"""Time between two exports. Ray's agents take the values every 10 seconds, and forget a gauge that was not set for 20."""

logger = logging.getLogger(__name__)


class RayMetrics:
    """Copies the metrics of this replica to Ray, in a thread of its own.

    Every series is a gauge for Ray, also those of counters and histograms. Ray's counters have no series before their
    first increase. Its agents replay each observation of a histogram as the middle of its bucket, which costs time per
    request and makes the sums inexact. Prometheus does not need the types: ``rate`` works on any series that grows.

    Args:
        families: returns the replica's metrics, see :meth:`serve_app.metrics.ReplicaMetrics.families`.
    """

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families
        self._gauges: dict[str, Gauge] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="revmux-ray-metrics", daemon=True)

    def start(self) -> None:
        """Export now, and then every :data:`EXPORT_SECONDS`."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        with suppress(RuntimeError):  # it never started
            self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                self.export()
            except Exception:
                logger.exception("the metrics of this replica did not reach Ray; the next export retries")
            if self._stopped.wait(EXPORT_SECONDS):
                return

    def export(self) -> None:
        """Copy all metrics to Ray once."""
        for family in self._families():
            for sample in samples(family):
                labels = dict(sample.labels)
                if sample.name not in self._gauges:
                    keys: Any = tuple(labels)  # Serve declares a tuple of one name
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, keys)
                self._gauges[sample.name].set(sample.value, labels)
