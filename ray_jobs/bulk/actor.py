"""The actor that classifies units. Its process imports this module, and nothing of Ray but its core."""

from __future__ import annotations

import logging

from revmux.bulk.job import Job
from revmux.bulk.system import unused_adapters
from revmux.bulk.units import Unit
from revmux.bulk.worker import Finished, Worker


class UnitActor:
    """An actor with a model. Its calls run in threads, so that several units overlap.

    Args:
        job: the job.
        device: where the model runs.
        threads: CPU threads of the model.
    """

    def __init__(self, job: Job, device: str, threads: int) -> None:
        logging.getLogger().setLevel(logging.WARNING)
        self._arguments = (job, device, threads)
        self._worker: Worker | None = None

    def place(self) -> None:
        """Return as soon as this actor has a place in the cluster."""

    def load(self) -> list[str]:
        """Load the model; returns a line for each adapter that is not used."""
        # Here and not in the constructor, whose exceptions Ray does not pass on.
        self._worker = Worker(*self._arguments)
        return unused_adapters(self._worker.task)

    def run(self, unit: Unit) -> Finished:
        """Classify a unit."""
        assert self._worker is not None
        return self._worker.run(unit)
