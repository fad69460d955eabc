"""A sweep while it runs: what became of each trial is written down, and told in words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback

from ray_jobs.ray_internals import ended_by_memory_monitor, last_error, process_was_lost
from ray_jobs.sweep.comparison import ENDS
from ray_jobs.sweep.trials import SweepFolder, Trial, TrialRow, front_rows, reason_of, row_of
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.waiting import Patience
from revmux.plan.front import front


class SweepProgress(Callback):
    """Completes the rows of trials that were stopped or failed, ends their MLflow runs, and tells how the sweep stands.

    A trial that came to its end has written its own row, so that a driver that is killed loses none.

    Args:
        folder: of the sweep.
        tracker: where trials are recorded.
        parent: MLflow run of the sweep.
        rows: of trials that came to an end in an earlier start; grows as others do.
        total: trials in all.
        concurrent: trials side by side.
        stopped: why trials were stopped, by Tune's trial id.
        wait_minutes: how long no trial may run for want of machines.
        each: what a trial's process takes of the cluster, as Ray names it.
    """

    def __init__(
        self,
        folder: SweepFolder,
        tracker: Tracker,
        parent: str,
        rows: dict[str, TrialRow],
        total: int,
        concurrent: int,
        stopped: Mapping[str, str],
        wait_minutes: float,
        each: Mapping[str, float],
    ) -> None:
        self.folder, self.tracker, self.parent = folder, tracker, parent
        self.rows, self.total, self.concurrent, self.stopped = rows, total, concurrent, stopped
        self.started: dict[str, float] = {}
        self.latest: dict[str, dict[str, float]] = {}
        self.seconds: list[float] = []
        self.patience, self.each = Patience("the sweep", wait_minutes), each

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune calls this over and over.

        Raises:
            UserError: no trial has found its place for too long.
        """
        if any(trial.status == "RUNNING" for trial in trials):
            self.patience.found()
        elif any(trial.status == "PENDING" for trial in trials):
            self.patience.look(1, self.each)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial begins."""
        self.started[trial.trial_id] = time.perf_counter()
        self._tell(f"{trial.config['trial'].name} begins")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tune calls this when a trial reports, after each epoch and at its end."""
        self.latest[trial.trial_id] = figures(result) or self.latest.get(trial.trial_id, {})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial came to its end, or was stopped."""
        mine: Trial = trial.config["trial"]
        why = self.stopped.get(trial.trial_id)
        if why is not None:
            self._end(trial, "stopped", why)
            self.folder.remove_checkpoints(mine)
            return
        self._take(trial, self.folder.read([mine])[mine.name])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when the process of a trial is lost or fails, and another goes on with it."""
        self._tell(f"{trial.config['trial'].name} goes on in another process, {last_failure(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when the process of a trial was lost, or failed, too often; the sweep goes on."""
        row = self.folder.read([trial.config["trial"]]).get(trial.config["trial"].name)
        if row is not None:
            self._take(trial, row)
        else:
            self._end(trial, "failed", f"{last_failure(trial)}; --retry_failed true tries it again")

    def _take(self, trial: Any, row: TrialRow) -> None:
        """A row that the trial wrote itself."""
        if row.status == "failed":
            self._end(trial, row.status, row.why)
            return
        self._note(trial, row)
        self._tell(f"{row.trial}: accuracy {row.metrics['accuracy_mean']:.1%} at cost {row.cost_counted:.2f}")

    def _end(self, trial: Any, status: Literal["stopped", "failed"], why: str) -> None:
        mine: Trial = trial.config["trial"]
        run_id = self.tracker.child_of(self.parent, mine.name)
        if run_id is not None:
            self.tracker.client.set_tag(run_id, "revmux.why", why)
            self.tracker.client.set_terminated(run_id, ENDS[status])
        seconds = time.perf_counter() - self.started.get(trial.trial_id, time.perf_counter())
        metrics = self.latest.get(trial.trial_id, {})
        row = row_of(mine, status, why, metrics=metrics, run_id=run_id, seconds=seconds)
        self.folder.write(row)
        self._note(trial, row)
        self._tell(f"{mine.name} {status}, {why}")

    def _note(self, trial: Any, row: TrialRow) -> None:
        self.rows[row.trial] = row
        self.seconds.append(time.perf_counter() - self.started.pop(trial.trial_id, time.perf_counter()))

    def _tell(self, what: str) -> None:
        print(f"{self.summary()}; {what}", flush=True)

    def summary(self) -> str:
        """Trials done, running and left, time left, and the best accuracy so far at each cost."""
        ended = list(self.rows.values())
        count = {status: sum(row.status == status for row in ended) for status in ("done", "stopped", "failed")}
        running = len(self.started)
        left = self.total - len(ended) - running
        words = f"sweep: {count['done']} done, {count['stopped']} stopped, {count['failed']} failed, "
        words += f"{running} running, {left} left"
        if self.seconds:
            each = sum(self.seconds) / len(self.seconds)
            words += f", about {each * (left + running / 2) / self.concurrent:.0f} s to go"
        best = [row for row in front(front_rows(ended)) if not row.kind.is_plain]
        if best:
            words += "; best " + ", ".join(f"{row.accuracy:.1%} at cost {row.cost:.2f}" for row in best)
        return words


def last_failure(trial: Any) -> str:
    """Why a trial of Tune failed the last time, in a line."""
    error = last_error(Path(trial.error_file).read_text()) if trial.error_file else ""
    if ended_by_memory_monitor(error):
        return "Ray ended its process, since the machine ran out of memory; choose fewer --concurrent_trials"
    return "its process was lost" if process_was_lost(error) else reason_of(error)


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of training among what Tune notes of a trial."""
    kept = ("selection_", "train_", "epoch")
    return {key: float(value) for key, value in result.items() if key.startswith(kept)}
