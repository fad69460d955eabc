"""Report a running sweep: write a row for each trial that ends, and print the state of the sweep."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback

from ray_jobs.cluster import ClusterConfig
from ray_jobs.ray_internals import ended_by_memory_monitor, forget_failures, last_error, process_was_lost
from ray_jobs.sweep.comparison import ENDS
from ray_jobs.sweep.concurrency import ConcurrencyWatch
from ray_jobs.sweep.trials import ACCURACY, EPOCH, SweepFolder, Trial, TrialRow, front_rows, reason_of, row_of
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.resource_wait import ResourceWait
from revmux.plan.front import front


class SweepReporter(Callback):
    """Writes the rows of trials that were stopped or failed, ends their MLflow runs, and prints the sweep's state.

    A trial that finishes writes its own row, so a killed driver loses no results.

    Args:
        folder: folder of the sweep.
        tracker: records the trials.
        earlier_runs: MLflow run of each trial of an earlier start, by name.
        rows: rows of trials that ended in an earlier start, by name; rows of other trials are added as they end.
        curves: selection accuracy per epoch in an earlier start, by name; extended as trials report.
        total: number of trials.
        concurrent: number of trials that run at the same time.
        stopped: reason for each stopped trial, by Tune's trial id.
        cluster: workers of a trial, and the time limit while no trial runs because machines are missing.
        each: resources of a trial's process, by Ray's names.
    """

    def __init__(
        self,
        folder: SweepFolder,
        tracker: Tracker,
        earlier_runs: Mapping[str, str],
        rows: dict[str, TrialRow],
        curves: Mapping[str, Mapping[int, float]],
        total: int,
        concurrent: int,
        stopped: Mapping[str, str],
        cluster: ClusterConfig,
        each: Mapping[str, float],
    ) -> None:
        self.folder, self.tracker, self.earlier_runs = folder, tracker, earlier_runs
        self.curves = {name: dict(curve) for name, curve in curves.items()}
        self.rows, self.total, self.concurrent, self.stopped = rows, total, concurrent, stopped
        self.started: dict[str, float] = {}
        self.latest: dict[str, dict[str, float]] = {}
        self.seconds: list[float] = []
        self.resource_wait, self.each = ResourceWait("the sweep", cluster.wait_minutes), each
        self.watch = ConcurrencyWatch(cluster, concurrent)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Check whether trials wait for resources; Tune calls this repeatedly.

        Raises:
            UserError: no trial could be scheduled within the time limit.
        """
        self.watch.look(trials)
        if any(trial.status == "RUNNING" for trial in trials):
            self.resource_wait.started()
        elif any(trial.status == "PENDING" for trial in trials):
            self.resource_wait.check(1, self.each)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial starts."""
        self.started[trial.trial_id] = time.perf_counter()
        self._print_state(f"{trial.config['trial'].name} started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tune calls this when a trial reports, after each epoch and at its end."""
        self.latest[trial.trial_id] = figures(result) or self.latest.get(trial.trial_id, {})
        mine: Trial = trial.config["trial"]
        curve = self.curves.setdefault(mine.name, {})
        if EPOCH in result and ACCURACY in result and int(result[EPOCH]) not in curve:
            curve[int(result[EPOCH])] = float(result[ACCURACY])
            self.folder.write_curve(mine, curve)
            forget_failures(trial)  # losses only count while they prevent progress

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial finished or was stopped."""
        mine: Trial = trial.config["trial"]
        reason = self.stopped.get(trial.trial_id)
        if reason is not None:
            self._end(trial, "stopped", reason)
            self.folder.remove_checkpoints(mine)
            return
        self._use_own_row(trial, self.folder.read([mine])[mine.name])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial's process was lost or failed and another process continues the trial."""
        if self.folder.read([trial.config["trial"]]):
            return  # it has ended, and only its last report is missing
        self._print_state(f"{trial.config['trial'].name} continues in another process: {last_failure(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial's process was lost or failed too often; the sweep continues."""
        row = self.folder.read([trial.config["trial"]]).get(trial.config["trial"].name)
        if row is not None:
            self._use_own_row(trial, row)
        else:
            self._end(trial, "failed", f"{last_failure(trial)}; use --retry_failed true to retry it")

    def _use_own_row(self, trial: Any, row: TrialRow) -> None:
        """Report the row that the trial wrote itself."""
        if row.status == "failed":
            self._end(trial, row.status, row.why)
            return
        self._add(trial, row)
        self._print_state(
            f"{row.trial}: selection accuracy {row.metrics['selection_accuracy']:.1%} at cost {row.cost_counted:.2f}"
        )

    def _end(self, trial: Any, status: Literal["stopped", "failed"], why: str) -> None:
        mine: Trial = trial.config["trial"]
        run_id = self.folder.run_id(mine) or self.earlier_runs.get(mine.name)
        if run_id is not None:
            self.tracker.client.set_tag(run_id, "revmux.why", why)
            self.tracker.client.set_terminated(run_id, ENDS[status])
        seconds = time.perf_counter() - self.started.get(trial.trial_id, time.perf_counter())
        metrics = self.latest.get(trial.trial_id, {})
        row = row_of(mine, status, why, metrics=metrics, run_id=run_id, seconds=seconds)
        self.folder.write(row)
        self._add(trial, row)
        self._print_state(f"{mine.name} {status}: {why}")

    def _add(self, trial: Any, row: TrialRow) -> None:
        self.rows[row.trial] = row
        self.seconds.append(time.perf_counter() - self.started.pop(trial.trial_id, time.perf_counter()))

    def _print_state(self, event: str) -> None:
        print(f"{self.summary()}; {event}", flush=True)

    def summary(self) -> str:
        """Number of trials by status, estimated time left, and the best selection accuracy so far at each cost."""
        ended = list(self.rows.values())
        count = {status: sum(row.status == status for row in ended) for status in ("done", "stopped", "failed")}
        running = len(self.started)
        left = self.total - len(ended) - running
        text = f"sweep: {count['done']} done, {count['stopped']} stopped, {count['failed']} failed, "
        text += f"{running} running, {left} left"
        if self.seconds:
            each = sum(self.seconds) / len(self.seconds)
            text += f", about {each * (left + running / 2) / self.concurrent:.0f} s left"
        best = [row for row in front(front_rows(ended)) if not row.kind.is_plain]
        if best:
            text += "; best " + ", ".join(f"{row.accuracy:.1%} at cost {row.cost:.2f}" for row in best)
        return text


def last_failure(trial: Any) -> str:
    """The reason for the latest failure of a Tune trial, on one line."""
    error = last_error(Path(trial.error_file).read_text()) if trial.error_file else ""
    if ended_by_memory_monitor(error):
        return "Ray ended its process because the machine ran out of memory; choose fewer --concurrent_trials"
    return "its process was lost" if process_was_lost(error) else reason_of(error)


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The training metrics in a result of Tune."""
    kept = ("selection_", "train_", "epoch")
    return {key: float(value) for key, value in result.items() if key.startswith(kept)}
