"""Run one trial of a sweep in the process that Ray Tune starts for it.

A trial with one worker trains in Tune's process (Ray Train's local mode), and Tune reuses that process for the next
trial, because starting processes would take most of the time of a short trial. A trial with several workers has separate
worker processes, which Tune's process drives.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ray_jobs.cluster import ClusterConfig
from ray_jobs.ray_internals import trial_stop_check
from ray_jobs.sweep.concurrency import trains_in_process
from ray_jobs.sweep.trials import FAILED, SweepFolder, Trial, reason_of, row_of
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.launch import TrialHooks, launch
from revmux.errors import UserError
from revmux.features.tokens import TokenizedTask
from revmux.utils.copies import join_location


def run_trial(
    point: dict[str, Any],
    task: TokenizedTask,
    cluster: ClusterConfig,
    tracking: TrackingConfig,
    storage: str,
    folder: SweepFolder,
    parent: str,
    earlier_runs: Mapping[str, str],
    command: str,
) -> None:
    """Run a trial with Ray Train and write its row when it is done or has failed for good.

    Args:
        point: ``{"trial": Trial}``.
        task: the tokens of the data.
        cluster: workers of the trial.
        tracking: with an explicit URI.
        storage: storage of the job.
        folder: folder of the sweep.
        parent: MLflow run of the sweep.
        earlier_runs: MLflow run of each trial of an earlier start, by name.
        command: command that started the sweep.

    Raises:
        Exception: with one worker, an error that another process may not meet; Tune retries the trial from its last
            checkpoint. With several workers, any error after which Ray Train gave up; in Tune's next try the trial only
            reports that it failed.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    trial: Trial = point["trial"]
    row = folder.read([trial]).get(trial.name)
    if row is not None:  # an earlier process of the trial wrote its row and did not report it
        tune.report(row.metrics if row.status == "done" else {FAILED: True})
        return
    started = time.perf_counter()
    output = join_location(folder.location, f"trials/{trial.name}")
    tracker = Tracker(tracking, storage, command)
    inside = trains_in_process(cluster)
    if inside:
        _free_former_trial()
        if cluster.use_gpu:
            torch.cuda.empty_cache()  # other processes may share the GPU
        # A stopped trial ends its MLflow run first. If that took longer than this time, the next trial would fail.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "3600"
    hooks = TrialHooks(report=tune.report)
    if not inside:
        hooks = TrialHooks(callbacks=[TuneReportCallback()], stopping=trial_stop_check())
    hooks = replace(hooks, earlier_run=earlier_runs.get(trial.name))
    try:
        trained = launch(trial.recipe, task, cluster, tracker, folder.location, trial.name, output, parent, hooks=hooks)
        trained.forget()
    except Exception as error:
        if inside and not isinstance(error, UserError):
            raise
        folder.write(row_of(trial, "failed", reason_of(f"{type(error).__name__}: {error}")))
        if not inside:  # a report of an epoch may be in flight, and Tune accepts one report at a time
            raise
        tune.report({FAILED: True})
        return
    figures: dict[str, Any] = {
        "metrics": trained.metrics,
        "cost_counted": trained.metrics["cost_counted"],
        "seconds": time.perf_counter() - started,
        "adapter": trained.folder,
        "run_id": trained.run_id,
    }
    folder.write(row_of(trial, "done", **figures))
    tune.report(trained.metrics)


@cache
def _set_imports_aside() -> None:
    """Keep the garbage collector away from the objects of libraries, which are far more than those of a trial."""
    import ray_jobs.training.worker  # noqa: F401  # a trial would import it later

    gc.collect()
    gc.freeze()


def _free_former_trial() -> None:
    """Free the models of the previous trial in this process."""
    _set_imports_aside()
    gc.collect()
