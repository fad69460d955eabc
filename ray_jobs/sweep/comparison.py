"""Record a finished sweep in MLflow: equal keys on every child run, and the front as artifacts of the parent run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ray_jobs.sweep.trials import TrialRow, front_rows
from ray_jobs.tracking.outbox import is_refusal
from ray_jobs.tracking.tracker import Tracker
from revmux.errors import UserError
from revmux.plan.front import FrontRow, front
from revmux.plan.plots import plot_front_html, plot_front_png
from revmux.utils.files import write_json
from revmux.utils.redact import error_line

ABSENT = "none"
"""Value in MLflow of a setting that a trial's method does not have."""
SYSTEM = "system/"
ENDS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's run status for each status of a trial."""


def equalize_children(tracker: Tracker, parent: str, rows: Sequence[TrialRow]) -> None:
    """Give every trial's run the keys of all trials, since MLflow compares only runs that have the same keys.

    A metric that a trial did not reach is NaN. Each run gets the final status of its row. A run that still counts as
    running but has no row is marked KILLED.
    """
    from mlflow.entities import Metric, Param

    children = tracker.children(parent)
    params = {key for run in children for key in run.data.params}
    metrics = {key for run in children for key in run.data.metrics if not key.startswith(SYSTEM)}
    ends = {row.run_id: ENDS[row.status] for row in rows}
    for run in children:
        end = ends.get(run.info.run_id, "KILLED" if run.info.status == "RUNNING" else run.info.status)
        if run.info.status != end:
            tracker.client.set_terminated(run.info.run_id, end)
        tracker.client.log_batch(
            run.info.run_id,
            params=[Param(key, ABSENT) for key in sorted(params - run.data.params.keys())],
            metrics=[
                Metric(key, math.nan, run.info.start_time, 0) for key in sorted(metrics - run.data.metrics.keys())
            ],
        )


def record_front(rows: Sequence[FrontRow], folder: Path, title: str) -> list[Path]:
    """Write the front of a comparison: ``front.json``, ``front.png`` and the interactive ``front.html``."""
    write_json(folder / "front.json", [asdict(row) for row in rows])
    return [
        folder / "front.json",
        plot_front_png(rows, folder / "front.png", title),
        plot_front_html(rows, folder / "front.html", title),
    ]


def record_comparison(tracker: Tracker, parent: str, rows: Sequence[TrialRow], folder: Path, title: str) -> None:
    """Record a sweep's trials and front on its parent run.

    Raises:
        UserError: no trial finished, or none reported an accuracy.
    """
    write_json(folder / "sweep.json", [asdict(row) for row in rows])
    try:
        equalize_children(tracker, parent, rows)
    except Exception as error:
        if is_refusal(error):
            raise
        print(
            f"cannot reach MLflow ({error_line(error)}); run the same command again later to complete the comparison: {folder}",
            flush=True,
        )
    tracker.client.log_artifact(parent, str(folder / "sweep.json"))
    counts = {f"trials_{status}": sum(row.status == status for row in rows) for status in ("done", "stopped", "failed")}
    tracker.log_metrics(parent, {name: float(count) for name, count in counts.items()})
    if not counts["trials_done"]:
        reason = next((row.why for row in rows if row.why), "")
        raise UserError(
            f"none of the {len(rows)} trials finished ({reason}); see {folder / 'sweep.json'} for each trial"
        )
    compared = front_rows(rows)
    if not compared:
        raise UserError(
            f"no trial reported selection_accuracy, so there is nothing to compare; see {folder / 'sweep.json'}"
        )
    for artifact in record_front(compared, folder, title):
        tracker.client.log_artifact(parent, str(artifact))
    for step, row in enumerate(front(compared)):
        figures = {"front_accuracy": row.accuracy, "front_cost": row.cost, "front_test_accuracy": row.test_accuracy}
        tracker.log_metrics(parent, {key: value for key, value in figures.items() if not math.isnan(value)}, step)
