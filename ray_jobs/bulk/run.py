"""Classify a data set with a pool of actors, and record the run in MLflow."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path

from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.bulk.pool import ActorPool
from ray_jobs.cli import Unfinished
from ray_jobs.cluster import connected
from ray_jobs.paths import recording_storage
from ray_jobs.tracking.tracker import Tracker
from revmux.bulk.classify import Report, finish, must_stop, start_progress, warn_agreement
from revmux.bulk.config import BulkConfig
from revmux.bulk.job import Job, prepare_job
from revmux.bulk.output import OutputFolder
from revmux.bulk.progress import Progress, Reporter
from revmux.bulk.summary import SUMMARY_NAMES, write_summary
from revmux.bulk.system import adapter_sources
from revmux.bulk.units import Work
from revmux.utils.redact import without_passwords
from serve_app.sources import fetch_adapter, is_mlflow

FAILED_UNITS, STOPPED_BY_AUDIT = 3, 4
"""Exit statuses of a job that did not classify every row."""
RUN_NAME = "run.json"
"""The file in the output folder with the id of the job's MLflow run, which a continued job resumes."""


def run_classify(job: ClassifyJob, work: Work) -> Report:
    """Run the whole job.

    Args:
        job: the settings, with absolute paths.
        work: the units of the input.

    Raises:
        UserError: the settings are wrong, the output has the answers of other settings, or it cannot be written.
        Unfinished: units failed, or the audit stopped the job.
    """
    storage = recording_storage(job.storage, job.tracking.uri)
    job.cluster.check_here()
    tracker = Tracker(job.tracking, storage)
    with tempfile.TemporaryDirectory() as downloads:
        adapters = _fetch_adapters(job, tracker, Path(downloads))
        prepared = prepare_job(job, work, adapters, job.cluster.device)
    for path in work.ignored[:3]:
        print(f"classify: {path} is not a data file and is ignored ({len(work.ignored)} in all)", flush=True)
    output = OutputFolder(prepared.output)
    with output.opened(prepared.settings):
        progress = start_progress(job, prepared, work, output)
        print(
            f"classify: {work.rows:,} rows in {work.files:,} files, {len(work.units):,} units, of which {progress.resumed:,} are "
            f"finished: {prepared.output}",
            flush=True,
        )
        with tracker.run(job.name, _params(job), resume=_former_run(output, tracker)) as run_id:
            output.meta.write(RUN_NAME, json.dumps({"run_id": run_id}).encode())
            stopped = _run_units(job, prepared, output, progress, storage, tracker, run_id)
            report = finish(prepared, output, progress, stopped)
            write_summary(output, report, prepared)
            _log_summary(tracker, run_id, output)
            _print_report(report, prepared)
            _check(report, job)
    return report


def _fetch_adapters(job: ClassifyJob, tracker: Tracker, downloads: Path) -> list[tuple[Path, str]]:
    """The local folders of the adapters, with their names."""
    sources = adapter_sources(job)
    if any(is_mlflow(source) for source in sources):
        import mlflow

        mlflow.set_tracking_uri(job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or tracker.uri)
    return [(fetch_adapter(source, downloads), source) for source in sources]


def _run_units(
    job: ClassifyJob,
    prepared: Job,
    output: OutputFolder,
    progress: Progress,
    storage: str,
    tracker: Tracker,
    run_id: str,
) -> bool:
    """Run all pending units; returns whether the audit stopped the job."""
    if not progress.pending or must_stop(progress, job.audit_floor):
        return must_stop(progress, job.audit_floor)
    with connected(job.cluster, storage):
        pool = ActorPool(prepared, job.cluster, progress)

        def record(state: Progress) -> None:
            print(f"classify: {state.line(pool.workers)}", flush=True)
            tracker.log_metrics(run_id, state.metrics(pool.workers), step=len(state.records))
            output.write_worker_seconds(state.worker_seconds)

        report = Reporter(record, job.progress_seconds)
        stopped = False

        def on_step() -> bool:
            nonlocal stopped
            report(progress)
            stopped = must_stop(progress, job.audit_floor)
            return stopped

        pool.run(on_step)
        return stopped


def _params(job: ClassifyJob) -> dict[str, object]:
    return {item.name: getattr(job, item.name) for item in fields(BulkConfig)} | {"cluster": job.cluster}


def _former_run(output: OutputFolder, tracker: Tracker) -> str | None:
    """The MLflow run of an earlier start of the same job, if the store has it."""
    content = output.meta.read(RUN_NAME)
    run_id = None if content is None else json.loads(content.to_pybytes()).get("run_id")
    return run_id if tracker.has_run(run_id) else None


def _log_summary(tracker: Tracker, run_id: str, output: OutputFolder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in SUMMARY_NAMES:
            content = output.meta.read(name)
            if content is not None:
                (Path(folder) / name).write_bytes(content.to_pybytes())
        tracker.log_folder(run_id, Path(folder), "summary")


def _print_report(report: Report, prepared: Job) -> None:
    totals = report.totals
    print(
        f"classify: {totals.rows:,} rows, {totals.errors:,} bad, {totals.truncated:,} truncated; counted cost "
        f"{totals.relative_cost:.2f} of the plain model"
    )
    if report.price is not None:
        print(f"classify: {report.price}")
    if totals.agreement.rows:
        print(f"classify: agreement with the plain model: {totals.agreement}")
    if warning := warn_agreement(totals.agreement, prepared.system.promised_agreement):
        print(f"classify: warning: {warning}")
    print(f"classify: summary: {without_passwords(report.output)}/_revmux/{SUMMARY_NAMES[0]}", flush=True)


def _check(report: Report, job: ClassifyJob) -> None:
    """Raise if the output is not complete."""
    if report.stopped:
        raise Unfinished(
            STOPPED_BY_AUDIT,
            f"the audit stopped the job: the agreement with the plain model is {report.totals.agreement}, below "
            f"audit_floor {job.audit_floor:g}; raise the threshold, or make another plan on data like this",
        )
    if report.failed:
        for one in report.failed:
            print(f"classify: failed: {one.unit}: {one.error}", flush=True)
        rows = sum(one.unit.rows for one in report.failed)
        raise Unfinished(
            FAILED_UNITS,
            f"{len(report.failed)} of {report.units} units ({rows:,} rows) failed {job.attempts} times each and are missing "
            "from the output; run the same command again to retry them",
        )
