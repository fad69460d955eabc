"""Run one trial of a sweep in the process that Ray Tune starts for it.

A trial with one worker trains in Tune's process (Ray Train's local mode), and Tune reuses that process for the next
trial, because starting processes would take most of the time of a short trial. A trial with several workers has separate
worker processes, which Tune's process drives.
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
from revmux.errors import UserError
from revmux.features.tokens import TokenizedTask


def trains_in_process(cluster: ClusterConfig) -> bool:
    """Whether a trial's process is its only worker, instead of the driver of other workers."""
    return cluster.workers == 1


def trial_resources(cluster: ClusterConfig) -> dict[str, float]:
    """The resources that Tune reserves for a trial's process, by Ray's names.

    A process that only waits for its workers gets a small part of the resource that only this driver's node has. The
    processes of all trials are then beside the driver, and not on the head.
    """
    if trains_in_process(cluster):
        return cluster.worker_resources
    import ray

    here = ray.get_runtime_context().get_node_id()
    (address,) = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here]
    return {f"node:{address}": 0.001}


def fitting_trials(cluster: ClusterConfig, present: dict[str, float]) -> int:
    """The number of trials that fit on the cluster at the same time, at least one."""
    fitting = present.get("CPU", 0) // (cluster.cpus_per_worker * cluster.workers)
    if cluster.use_gpu:
        fitting = min(fitting, present.get("GPU", 0) // (cluster.gpus_per_worker * cluster.workers))
    return max(1, int(fitting))


def run_trial(
    point: dict[str, Any],
    task: TokenizedTask,
    cluster: ClusterConfig,
    tracking: TrackingConfig,
    storage: Path,
    folder: SweepFolder,
    parent: str,
    command: str,
) -> None:
    """Run a trial with Ray Train and write its row when it is done or has failed for good.

    Args:
        point: ``{"trial": Trial}``.
        task: the tokens of the data.
        cluster: workers of the trial.
        tracking: with an explicit URI.
        storage: storage folder of the job.
        folder: folder of the sweep.
        parent: MLflow run of the sweep.
        command: command that started the sweep.

    Raises:
        Exception: with one worker, an error that another process may not meet; Tune retries the trial from its last
            checkpoint. With several workers, any error after which Ray Train gave up.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    trial: Trial = point["trial"]
    row = folder.read([trial]).get(trial.name)
    if row is not None and row.status == "done":  # the process was lost after it wrote its row and before it reported
        tune.report(row.metrics)
        return
    started = time.perf_counter()
    output, tracker = folder.path / "trials" / trial.name, Tracker(tracking, storage, command)
    inside = trains_in_process(cluster)
    if inside:
        gc.collect()  # free the models of the previous trial
        if cluster.use_gpu:
            torch.cuda.empty_cache()  # other processes may share the GPU
        # A stopped trial ends its MLflow run first. If that took longer than this time, the next trial would fail.
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
        if not inside:  # a report of an epoch may be in flight, and Tune accepts one report at a time
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
