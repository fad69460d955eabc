"""Classify a data set in this process, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from revmux.bulk.audit import Agreement
from revmux.bulk.config import BulkConfig
from revmux.bulk.job import Job, list_and_prepare
from revmux.bulk.output import OutputError, OutputFolder
from revmux.bulk.price import JobPrice
from revmux.bulk.progress import FailedUnit, Progress, Reporter, Totals
from revmux.bulk.system import unused_adapters
from revmux.bulk.units import Unit, Work
from revmux.bulk.worker import UNITS_IN_FLIGHT, Finished, Worker
from revmux.errors import UserError
from revmux.utils.redact import error_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """The result of a job.

    Attributes:
        totals: sums over all finished units, those of earlier runs included.
        failed: units that were left out.
        resumed: number of units that an earlier run finished.
        units: number of all units.
        stopped: whether the audit stopped the job.
        output: the output folder.
        price: price of the rows; None without the price of an hour.
    """

    totals: Totals
    failed: list[FailedUnit]
    resumed: int
    units: int
    stopped: bool
    output: str
    price: JobPrice | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the output has all rows of the input."""
        return not self.failed and not self.stopped


def classify_files(
    config: BulkConfig, device: torch.device | str = "cpu", on_progress: Callable[[Progress], None] | None = None
) -> Report:
    """Classify all rows of the input, and write the answers.

    The same call continues an interrupted one.

    Args:
        config: the settings.
        device: where the model runs.
        on_progress: called with the progress every ten seconds and at the end.

    Raises:
        UserError: the settings are wrong, a file cannot be read, or the output has the answers of other settings.
    """
    job, work = list_and_prepare(config, str(device))
    output = OutputFolder(job.output)

    def record(progress: Progress) -> None:
        output.write_worker_seconds(progress.worker_seconds)
        if on_progress is not None:
            on_progress(progress)

    report = Reporter(record)
    with output.opened(job.settings):
        progress = start_progress(config, job, work, output)
        stopped = must_stop(progress, config.audit_floor)
        if progress.pending and not stopped:
            worker = Worker(job, str(device))
            for line in unused_adapters(worker.task):
                _log.warning(line)
            progress.start()
            with ThreadPoolExecutor(UNITS_IN_FLIGHT) as pool:
                running: dict[Future[Finished], Unit] = {}
                while (progress.pending or running) and not stopped:
                    while progress.pending and len(running) < UNITS_IN_FLIGHT:
                        unit = progress.pending.popleft()
                        running[pool.submit(worker.run, unit)] = unit
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        _collect(progress, running.pop(future), future)
                    progress.charge(1)
                    report(progress)
                    stopped = must_stop(progress, config.audit_floor)
        return finish(job, output, progress, stopped)


def start_progress(config: BulkConfig, job: Job, work: Work, output: OutputFolder) -> Progress:
    """The progress of a job, with the units that earlier starts finished and the time of their workers."""
    finished = output.finished(work.units, job.key)
    return Progress(work.units, finished, config.attempts, config.price, output.worker_seconds())


def _collect(progress: Progress, unit: Unit, future: Future[Finished]) -> None:
    error = future.exception()
    if error is None:
        done = future.result()
        progress.finish(done.number, done.record, done.device_seconds)
    elif isinstance(error, Exception) and not isinstance(error, OutputError):
        progress.fail(unit, describe_error(error))
    else:
        raise error


def describe_error(error: BaseException) -> str:
    """An error on one line, with its type if it is not the user's."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error_line(error)}"


def must_stop(progress: Progress, floor: float | None) -> bool:
    """Whether the audit's agreement is below the floor."""
    return floor is not None and progress.totals.agreement.is_below(floor)


def finish(job: Job, output: OutputFolder, progress: Progress, stopped: bool) -> Report:
    """Write the workers' time, and the manifest if all units are finished; returns the report.

    Raises:
        UserError: the parts do not have exactly the rows of the input.
    """
    output.write_worker_seconds(progress.worker_seconds)
    report = Report(
        progress.totals, progress.failed, progress.resumed, len(progress.units), stopped, job.output, progress.price
    )
    if report.is_complete:
        output.write_manifest(progress.units, progress.records, job.settings)
    else:
        output.remove_manifest()
    return report


def warn_agreement(agreement: Agreement, promised: float | None) -> str | None:
    """A warning if the agreement is below what the system had in its evaluation, with 95% confidence."""
    if promised is None or not agreement.rows or agreement.interval()[1] >= promised:
        return None
    return (
        f"the agreement with the plain model is {agreement}, but the adapter's evaluation found {promised:.2%}; the "
        "input may differ from the data of the evaluation; raise the threshold, or make another plan on data like this"
    )
