"""Work that cannot start, since machines are missing: the log says what is waited for, and at some time it ends."""

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

from ray_jobs.ray_internals import ControllerCallback, workers_are_running
from revmux.errors import UserError

TELL_SECONDS = 30.0
"""How often a run that waits says so; Ray Train asks the cluster for its workers again as often."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Ray Train's setting; it passes the driver's value on to the controller of a run."""


class Patience:
    """Tells what work waits for, and ends when that does not come. Ray itself waits in silence, for ever.

    Args:
        title: what waits, in the words of the progress lines.
        minutes: after which it ends if the whole cluster cannot hold its workers; 0 waits for ever. Where other work
            holds what would be enough, it waits its turn however long.

    Attributes:
        interval: seconds between lines.
    """

    def __init__(self, title: str, minutes: float) -> None:
        self.title, self.minutes = title, minutes
        self.interval = min(TELL_SECONDS, minutes * 60) if minutes else TELL_SECONDS
        self.told: float | None = None
        self.short_since: float | None = None

    def found(self) -> None:
        """It has begun; the next wait counts anew."""
        self.told = self.short_since = None

    def look(self, workers: int, each: Mapping[str, float]) -> None:
        """Call this as long as it waits, as often as you like.

        Args:
            workers: how many.
            each: what one of them needs.

        Raises:
            UserError: the time is over.
        """
        now = time.monotonic()
        if self.told is None:
            self.told = self.short_since = now
            return
        if now - self.told < 0.9 * self.interval:
            return
        self.told = now
        present, free = ray.cluster_resources(), ray.available_resources()
        short = missing(workers, each, present)
        words = f"{workers} × {amounts(each)}; the cluster has {amounts(each, present)}, free {amounts(each, free)}"
        if not short:
            self.short_since = None
            print(f"{self.title}: waits for its workers, {words}", flush=True)
            return
        self.short_since = self.short_since or now
        waited = (now - self.short_since) / 60
        if self.minutes and waited >= 0.9 * self.minutes:
            raise UserError(
                f"the workers of {self.title} did not find their place for {waited:.1f} minutes: {words}; add machines "
                "and give the same command again, choose fewer --cluster.workers, or a longer --cluster.wait_minutes"
            )
        print(f"{self.title}: waits for machines, {words}", flush=True)


def wait_for_a_place(title: str, each: Mapping[str, float], minutes: float) -> None:
    """Return when the cluster has room for a worker; one that scales with demand is asked for it.

    Args:
        title: what waits, in the words of the progress lines.
        each: what a worker needs.
        minutes: see :class:`Patience`.

    Raises:
        UserError: the time is over.
    """
    patience = Patience(title, minutes)
    patience.look(1, each)
    place = placement_group([dict(each)])
    try:
        while not place.wait(patience.interval):
            patience.look(1, each)
    finally:
        remove_placement_group(place)


@contextmanager
def start_timeout(seconds: float) -> Iterator[None]:
    """Within, Ray Train asks the cluster for the workers of a run again after so long, unless the user chose a time.

    Args:
        seconds: between two attempts.
    """
    if START_TIMEOUT in os.environ:
        yield
        return
    os.environ[START_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        del os.environ[START_TIMEOUT]


class Waiting(ControllerCallback):
    """:class:`Patience` for the workers of a Ray Train run.

    Args:
        title: see there.
        minutes: see there.
    """

    def __init__(self, title: str, minutes: float) -> None:
        self.patience = Patience(title, minutes)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train calls this on its controller, which reads the setting later from its environment."""
        # A worker that waits for one that failed cannot leave their group; it is ended after so long. By default 30 s.
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, "5")

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> None:
        """Ray Train calls this whenever it is about to start the workers, so again after each time-out.

        Raises:
            ControllerError: a :class:`UserError`, that the time is over.
        """
        each = {kind: amount for kind, amount in (scaling_config.resources_per_worker or {}).items() if amount}
        try:
            self.patience.look(num_workers, each)
        except UserError as error:
            raise ControllerError(error) from None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ray Train calls this at each turn of a run."""
        if workers_are_running(current_state):
            self.patience.found()


def missing(workers: int, each: Mapping[str, float], present: Mapping[str, float]) -> bool:
    """Whether a cluster has less than all workers together need.

    Args:
        workers: how many.
        each: what one of them needs.
        present: what the cluster has, free or not.
    """
    return any(workers * amount > present.get(kind, 0.0) for kind, amount in each.items())


def amounts(kinds: Mapping[str, float], there: Mapping[str, float] | None = None) -> str:
    """Resources in words, such as ``1 CPU and 1 GPU``: of those kinds, as many as are there."""
    there = kinds if there is None else there
    return " and ".join(f"{there.get(kind, 0.0):g} {kind}" for kind in kinds)
