"""Wait for cluster resources: log what is missing, and give up after a time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import ControllerError, ScalingConfig
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.util import placement_group, remove_placement_group

from ray_jobs.cluster import GIGABYTE, ClusterConfig
from ray_jobs.ray_internals import ControllerCallback, workers_are_running
from revmux.errors import UserError

LOG_SECONDS = 30.0
"""Seconds between log lines of a waiting run, and between Ray Train's attempts to start its workers."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""A setting of Ray Train, which passes the driver's value to the controller of a run."""


class ResourceWait:
    """Prints what waiting work needs and gives up after a time limit. Ray itself waits silently and without limit.

    Args:
        title: name of the waiting work in printed lines.
        minutes: time limit while the whole cluster is too small for the workers; 0 means no limit. There is no limit
            either while the cluster is large enough but other work uses its resources.

    Attributes:
        interval: seconds between printed lines.
    """

    def __init__(self, title: str, minutes: float) -> None:
        self.title, self.minutes = title, minutes
        self.interval = min(LOG_SECONDS, minutes * 60) if minutes else LOG_SECONDS
        self.last_check: float | None = None
        self.short_since: float | None = None

    def started(self) -> None:
        """Reset the clock because the work has started."""
        self.last_check = self.short_since = None

    def check(self, workers: int, each: Mapping[str, float]) -> None:
        """Print or raise if it is time to. Call this repeatedly while the work waits.

        Args:
            workers: number of workers.
            each: resources per worker.

        Raises:
            UserError: the time limit has passed.
        """
        now, is_first = time.monotonic(), self.last_check is None
        if self.last_check is not None and now - self.last_check < 0.9 * self.interval:
            return
        self.last_check = now
        present, free = ray.cluster_resources(), ray.available_resources()
        short = lacks_resources(workers, each, present)
        if is_first and not short:
            return  # there is room now or soon
        state = (
            f"{workers} × {format_resources(each)}; the cluster has {format_resources(each, present)}, "
            f"of which {format_resources(each, free)} are free"
        )
        if not short:
            self.short_since = None
            print(f"{self.title}: waiting for resources in use by other work: {state}", flush=True)
            return
        self.short_since = self.short_since or now
        waited = (now - self.short_since) / 60
        if self.minutes and waited >= 0.9 * self.minutes and not is_first:
            raise UserError(
                f"the cluster had too few resources for the workers of {self.title} for {waited:.1f} minutes: {state}; add "
                "machines and run the same command again, choose fewer --cluster.workers, or a longer --cluster.wait_minutes"
            )
        print(f"{self.title}: waiting for more machines: {state}", flush=True)


def wait_for_resources(title: str, cluster: ClusterConfig) -> None:
    """Return when the cluster has room for one worker; a cluster that scales with demand is asked to grow.

    Args:
        title: see :class:`ResourceWait`.
        cluster: resources and placement of the worker, and the time limit.

    Raises:
        UserError: the cluster has been too small for the worker for too long.
    """
    resource_wait, each = ResourceWait(title, cluster.wait_minutes), cluster.worker_resources
    resource_wait.check(1, each)
    labels = [dict(cluster.labels)] if cluster.labels else None
    group = placement_group([cluster.worker_bundle], bundle_label_selector=labels)
    try:
        while not group.wait(resource_wait.interval):
            resource_wait.check(1, each)
    finally:
        remove_placement_group(group)


@contextmanager
def start_timeout(seconds: float) -> Iterator[None]:
    """Inside the context, set the time after which Ray Train retries to start workers, unless the user has set it.

    Args:
        seconds: time between two attempts.
    """
    if START_TIMEOUT in os.environ:
        yield
        return
    os.environ[START_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        del os.environ[START_TIMEOUT]


class WorkerWait(ControllerCallback):
    """:class:`ResourceWait` for the workers of a Ray Train run.

    Args:
        title: see :class:`ResourceWait`.
        minutes: see :class:`ResourceWait`.
    """

    def __init__(self, title: str, minutes: float) -> None:
        self.resource_wait = ResourceWait(title, minutes)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Set an environment variable of the controller; Ray Train calls this when the controller starts."""
        # A worker that waits for a failed peer cannot leave the process group. Ray Train kills it after this time (default 30 s).
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, "5")

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> None:
        """Check the resources; Ray Train calls this before each attempt to start the workers.

        Raises:
            ControllerError: wraps a :class:`UserError`; the time limit has passed.
        """
        each = {kind: amount for kind, amount in (scaling_config.resources_per_worker or {}).items() if amount}
        try:
            self.resource_wait.check(num_workers, each)
        except UserError as error:
            raise ControllerError(error) from None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Reset the clock once the workers run; Ray Train calls this whenever the controller updates its state."""
        if workers_are_running(current_state):
            self.resource_wait.started()


def lacks_resources(workers: int, each: Mapping[str, float], present: Mapping[str, float]) -> bool:
    """Whether a cluster has less than all workers together need.

    Args:
        workers: number of workers.
        each: resources per worker.
        present: resources of the whole cluster, used or free.
    """
    return any(workers * amount > present.get(kind, 0.0) for kind, amount in each.items())


def format_resources(kinds: Mapping[str, float], amounts: Mapping[str, float] | None = None) -> str:
    """Resources as text, such as ``1 CPU and 1 GPU``: the kinds of the first mapping, with the amounts of the second."""
    amounts = kinds if amounts is None else amounts
    return " and ".join(
        f"{amounts.get(kind, 0.0) / GIGABYTE:g} GB of memory"
        if kind == "memory"
        else f"{amounts.get(kind, 0.0):g} {kind}"
        for kind in kinds
    )
