"""A pool of Ray actors that classify units.

Plain actors and not Ray Data: Ray Data repeats a block as often as its worker dies, so a unit that kills its worker would
stop the job. Here the driver knows which unit each worker holds, so such a unit is found, tried alone, and left out.
Actors that find no room wait until a machine joins the cluster, which makes the pool elastic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from ray_jobs.bulk.actor import UnitActor
from ray_jobs.cluster import ClusterConfig
from ray_jobs.training.resource_wait import ResourceWait
from revmux.bulk.classify import describe_error
from revmux.bulk.job import Job
from revmux.bulk.output import OutputError
from revmux.bulk.progress import Progress
from revmux.bulk.units import Unit
from revmux.bulk.worker import UNITS_IN_FLIGHT

WAIT_SECONDS = 1.0
"""Longest time between two looks at the clock."""


@dataclass(eq=False)
class _Slot:
    """One place in the pool, and the actor that has it.

    Attributes:
        actor: handle of the actor.
        placed: whether it has the resources that it needs.
        ready: whether its model is loaded.
        units: units that it holds.
    """

    actor: Any
    placed: bool = False
    ready: bool = False
    units: list[Unit] = field(default_factory=list)


class ActorPool:
    """Classifies all pending units.

    Args:
        job: the job.
        cluster: number of workers and their resources; already connected.
        progress: the state of the job, which is updated.
    """

    def __init__(self, job: Job, cluster: ClusterConfig, progress: Progress) -> None:
        self.cluster = cluster
        self.progress = progress
        self._job = ray.put(job)
        self._calls: dict[Any, tuple[_Slot, Unit | None]] = {}
        self._suspects: deque[Unit] = deque()
        self._alone: set[int] = set()  # units that may have killed a worker
        self._deaths = 0
        self._has_started = False
        self._wait = ResourceWait("classify", cluster.wait_minutes)
        count = min(cluster.workers, len(progress.pending))
        self._slots = [_Slot(self._start()) for _ in range(count)]
        for slot in self._slots:
            self._place(slot)

    @property
    def workers(self) -> int:
        """Number of workers that have a model."""
        return sum(slot.ready for slot in self._slots)

    def run(self, on_step: Callable[[], bool]) -> None:
        """Run until every unit is finished or left out.

        Args:
            on_step: called at least every second; returns whether to stop.

        Raises:
            UserError: the model cannot be loaded, the output cannot be written, or the cluster has no room for a worker
                for too long.
            RayActorError: workers die again and again while they load the model.
        """
        try:
            while not self.progress.is_done:
                self._assign()
                done, _ = ray.wait(list(self._calls), num_returns=1, timeout=WAIT_SECONDS)
                self.progress.charge(sum(slot.placed for slot in self._slots))
                for reference in done:
                    self._collect(reference)
                if not any(slot.placed for slot in self._slots):
                    self._wait.check(1, self.cluster.worker_resources)
                if on_step():
                    return
        finally:
            for slot in self._slots:
                ray.kill(slot.actor)

    def _start(self) -> Any:
        actor = ray.remote(UnitActor).options(**self.cluster.remote_options, max_concurrency=UNITS_IN_FLIGHT)
        return actor.remote(self._job, self.cluster.device, max(1, int(self.cluster.cpus_per_worker)))

    def _place(self, slot: _Slot) -> None:
        self._calls[slot.actor.place.remote()] = (slot, None)

    def _assign(self) -> None:
        """Give units to workers, evenly. A suspect runs while its worker holds nothing else."""
        for level in range(UNITS_IN_FLIGHT):
            for slot in self._slots:
                if not slot.ready or len(slot.units) > level or any(unit.number in self._alone for unit in slot.units):
                    continue
                if self._suspects and not slot.units:
                    self._give(slot, self._suspects.popleft())
                elif self.progress.pending:
                    self._give(slot, self.progress.pending.popleft())

    def _give(self, slot: _Slot, unit: Unit) -> None:
        slot.units.append(unit)
        self._calls[slot.actor.run.remote(unit)] = (slot, unit)

    def _collect(self, reference: Any) -> None:
        """Take the result of a call."""
        slot, unit = self._calls.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if unit is None or isinstance(cause, OutputError):
                raise cause from None
            slot.units.remove(unit)
            self._retry(unit, describe_error(cause))
        except RayActorError as error:
            self._replace(slot, error)
        else:
            if unit is None and not slot.placed:
                slot.placed = True
                self._wait.started()
                self._calls[slot.actor.load.remote()] = (slot, None)
                return
            if unit is None:
                if not self._has_started:
                    self._has_started = True
                    self.progress.start()
                    for line in result:
                        print(f"classify: warning: {line}", flush=True)
                slot.ready, self._deaths = True, 0
                return
            slot.units.remove(unit)
            self._alone.discard(unit.number)
            self.progress.finish(result.number, result.record, result.device_seconds)

    def _retry(self, unit: Unit, error: str) -> None:
        """Count a failure of a unit, and queue it again if it has attempts left."""
        if self.progress.fail(unit, error) and unit.number in self._alone:
            self.progress.pending.pop()
            self._suspects.append(unit)

    def _replace(self, slot: _Slot, error: RayActorError) -> None:
        """Start another actor in place of a dead one, and queue its units again.

        If the actor held several units, it is unknown which one killed it. Each of them then runs alone.
        """
        preempted = isinstance(error, ActorDiedError) and error.preempted
        if not slot.ready and not preempted:
            self._deaths += 1
            if self._deaths > self.cluster.max_failures:
                raise error
        for other in [call for call, (owner, _) in self._calls.items() if owner is slot]:
            del self._calls[other]
        units, slot.units, slot.placed, slot.ready = slot.units, [], False, False
        for held in units:
            if preempted:
                (self._suspects if held.number in self._alone else self.progress.pending).appendleft(held)
            elif len(units) == 1:
                self._alone.add(held.number)
                self._retry(held, f"its worker died ({str(error).splitlines()[0]})")
            else:
                self._alone.add(held.number)
                self._suspects.append(held)
        ray.kill(slot.actor)  # it may be unreachable and not dead
        slot.actor = self._start()
        self._place(slot)
