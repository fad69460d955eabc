"""A trial of a sweep, and the process that Ray Tune gives it.

Most of a short trial would be the start of processes, so a trial of one worker trains in the process that Ray Tune
gives it (Ray Train's local mode), and that process takes the next trial when it is done. A trial of several workers has
processes of its own, which the first one drives.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import torch

from ray_jobs.cluster import ClusterConfig
from ray_jobs.ray_internals import trial_stop_check
from ray_jobs.sweep.trials import FAILED, SweepFolder, Trial, reason_of, row_of
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.launch import TrialHooks, launch
from revmux.data.task import TaskData
from revmux.errors import UserError


def trains_itself(cluster: ClusterConfig) -> bool:
    """Whether the process of a trial is its one worker, or drives others."""
    return cluster.workers == 1


def trial_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What Tune reserves for the process of a trial, by Ray's names."""
    if not trains_itself(cluster):
        return {"memory": 1.0}  # it waits, its workers hold the cores; Tune wants something for it, so a byte
    return cluster.worker_resources


def fitting_trials(cluster: ClusterConfig, present: dict[str, float]) -> int:
    """How many trials the cluster's resources hold side by side, at least one."""
    fitting = present.get("CPU", 0) // (cluster.cpus_per_worker * cluster.workers)
    if cluster.use_gpu:
        fitting = min(fitting, present.get("GPU", 0) // (cluster.gpus_per_worker * cluster.workers))
    return max(1, int(fitting))


def run_trial(
    point: dict[str, Any],
    task: TaskData,
    cluster: ClusterConfig,
    tracking: TrackingConfig,
    storage: Path,
    folder: SweepFolder,
    parent: str,
    command: str,
) -> None:
    """One trial: a Ray Train run, which writes its row when it is done, or failed in a way that would come again.

    Args:
        point: ``{"trial": Trial}``.
        task: the data, which Tune hands over by its object store.
        cluster: workers of the trial.
        tracking: with the URI spelled out.
        storage: of the job.
        folder: of the sweep.
        parent: MLflow run of the sweep.
        command: that started the sweep.

    Raises:
        Exception: of a trial of one worker, what another process may not meet: Tune tries it again, from its last
            checkpoint. Of one of several workers, whatever Ray Train gave up on.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    trial: Trial = point["trial"]
    row = folder.read([trial]).get(trial.name)
    if row is not None and row.status == "done":  # the process was lost between its row and its report
        tune.report(row.metrics)
        return
    started = time.perf_counter()
    output, tracker = folder.path / "trials" / trial.name, Tracker(tracking, storage, command)
    inside = trains_itself(cluster)
    if inside:
        gc.collect()  # the models of the trial before, off the device
        if cluster.use_gpu:
            torch.cuda.empty_cache()  # others may share it
        # A trial that is stopped first ends its MLflow run. The trial after it would fail if that took longer.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "3600"
    hooks = TrialHooks(report=tune.report)
    if not inside:
        hooks = TrialHooks(callbacks=[TuneReportCallback()], stopping=trial_stop_check())
    try:
        trained = launch(trial.recipe, task, cluster, tracker, folder.path, trial.name, output, parent, hooks=hooks)
    except Exception as error:
        if inside and not isinstance(error, UserError):
            raise
        folder.write(row_of(trial, "failed", reason_of(f"{type(error).__name__}: {error}")))
        if not inside:  # an epoch may still be on its way to Tune, which takes one report at a time
            raise
        tune.report({FAILED: True})
        return
    figures: dict[str, Any] = {
        "metrics": trained.metrics,
        "cost_counted": trained.metrics["cost_counted"],
        "seconds": time.perf_counter() - started,
        "adapter": str(trained.folder),
        "run_id": trained.run_id,
    }
    folder.write(row_of(trial, "done", **figures))
    tune.report(trained.metrics)
