"""A sweep from its space to its recorded comparison."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_storage, store_in
from ray_jobs.ray_internals import out_of_memory_trials_are_retried
from ray_jobs.sweep.comparison import record_comparison
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.trial_process import fitting_trials, run_trial, trains_itself, trial_resources
from ray_jobs.sweep.trials import SweepFolder, Trial, TrialRow, make_trials
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.feature_pass import fill_for
from revmux.data.task import TaskData, load_task
from revmux.methods import BackboneShape
from revmux.pretrained.identity import identity_of
from revmux.pretrained.loading import check_answers, outline
from revmux.training.config import Recipe
from tune_spaces.points import legal_points
from tune_spaces.space import SearchSpace, load_space

if TYPE_CHECKING:
    from ray.tune import Tuner

    from ray_jobs.sweep.search import FrontSearch


@dataclass(frozen=True)
class Sweep:
    """A sweep that is checked and ready to start.

    Attributes:
        job: its settings.
        space: its space.
        trials: every legal point, cheapest first.
        task: the data.
        folder: of its rows and trials.
        storage: of the job, absolute.
    """

    job: TuneJob
    space: SearchSpace
    trials: list[Trial]
    task: TaskData
    folder: SweepFolder
    storage: Path


def base_recipe(job: TuneJob) -> Recipe:
    """What the space does not say."""
    return Recipe(job.backbone, job.data, optim=job.optim, loss=job.loss, store=job.store, shuffles=job.shuffles)


def prepare_sweep(job: TuneJob, storage: Path, task: TaskData | None = None) -> Sweep:
    """Check all that can be checked before a cluster starts.

    Args:
        job: settings.
        storage: absolute.
        task: the data where it is read already.

    Raises:
        UserError: a space without a legal point, a model without a head, unreadable data, or a sweep folder of another
            task.
    """
    job = replace(job, store=store_in(storage, job.store))
    space = load_space(job.space)
    if job.trials is not None:
        space = replace(space, trials=job.trials)
    job.cluster.check_training()
    check_answers(job.backbone)
    backbone, own_labels = outline(job.backbone)
    points, left_out = legal_points(space, base_recipe(job), BackboneShape.of(backbone), job.cluster.workers)
    for reason in left_out:
        print(f"left out: {reason}", flush=True)
    task = task or load_task(job.data, own_labels)
    identity = {"data": task.identity["sha256"], "model": identity_of(job.backbone)["sha256"] or job.backbone.model}
    folder = SweepFolder(storage / "sweeps" / job.name, identity)
    return Sweep(job, space, make_trials(points, task, backbone), task, folder, storage)


def run_sweep(sweep: Sweep, tracker: Tracker) -> tuple[list[TrialRow], str]:
    """A sweep on the connected cluster, recorded; returns its rows, cheapest first, and the MLflow run of the sweep."""
    job, folder = sweep.job, sweep.folder
    parent = folder.parent() if tracker.has_run(folder.parent()) else None
    settings = {"space": job.space, "points": len(sweep.trials), "sweep": sweep.space}
    with tracker.run(job.name, settings, resume=parent) as parent:
        folder.set_parent(parent)
        if not tracker.client.get_run(parent).inputs.dataset_inputs:
            tracker.log_data(parent, sweep.task.identity)
        rows = run_trials(sweep, tracker, parent)
        title = f"{sweep.task.identity['source']} on {job.backbone.model.rpartition('/')[2]}"
        record_comparison(tracker, parent, rows, folder.path, title)
    return rows, parent


def run_trials(sweep: Sweep, tracker: Tracker, parent: str) -> list[TrialRow]:
    """The trials that are left, by Ray Tune; rows of an earlier start are kept."""
    from ray_jobs.sweep.search import FrontSearch

    job, folder = sweep.job, sweep.folder
    rows = kept_rows(sweep)
    limit = sweep.space.trials
    search = FrontSearch(sweep.trials, list(rows.values()), limit, sweep.space.search == "optuna", sweep.space.seed)
    if rows:
        print(f"sweep: {len(rows)} trials came to an end before, {search.budget} are left", flush=True)
    if search.budget:
        concurrent = trials_side_by_side(job)
        fill_for([trial.recipe for trial in sweep.trials], sweep.task, job.cluster, concurrent * job.cluster.workers)
        shutil.rmtree(folder.path / "tune", ignore_errors=True)  # of an earlier start; what counts is in the rows
        tuner = make_tuner(sweep, tracker, parent, rows, search, concurrent)
        with out_of_memory_trials_are_retried():
            tuner.fit()
    found = folder.read(sweep.trials)
    return [found[trial.name] for trial in sweep.trials if trial.name in found]


def kept_rows(sweep: Sweep) -> dict[str, TrialRow]:
    """The rows of an earlier start, without those that are to be tried again."""
    rows = sweep.folder.read(sweep.trials)
    if sweep.job.retry_failed:
        for name in [name for name, row in rows.items() if row.status == "failed"]:
            sweep.folder.forget(rows.pop(name))
    return rows


def trials_side_by_side(job: TuneJob) -> int:
    """How many trials run at the same time."""
    import ray

    return job.concurrent_trials or fitting_trials(job.cluster, ray.cluster_resources())


def make_tuner(
    sweep: Sweep, tracker: Tracker, parent: str, rows: dict[str, TrialRow], search: FrontSearch, concurrent: int
) -> Tuner:
    """Ray Tune, set up for the trials that are left.

    Args:
        sweep: what is swept.
        tracker: where trials are recorded.
        parent: MLflow run of the sweep.
        rows: of an earlier start; grows as trials end.
        search: which trials are tried, in which order.
        concurrent: trials side by side.
    """
    from ray import tune

    from ray_jobs.sweep.early_stopping import FrontScheduler
    from ray_jobs.sweep.progress import SweepProgress

    job, folder = sweep.job, sweep.folder
    parameters = {
        "task": sweep.task,
        "cluster": job.cluster,
        "tracking": TrackingConfig(tracker.uri, job.tracking.experiment),
        "storage": sweep.storage,
        "folder": folder,
        "parent": parent,
        "command": tracker.command,
    }
    resources = trial_resources(job.cluster)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, **parameters), tune.PlacementGroupFactory([resources])
    )
    scheduler = None
    if job.stopping.enabled:
        scheduler = FrontScheduler(
            len(sweep.task.selection), job.stopping.grace, job.stopping.reduction, job.stopping.deviations
        )
    stopped = scheduler.stopped if scheduler is not None else {}
    total, wait_minutes = len(rows) + search.budget, job.cluster.wait_minutes
    progress = SweepProgress(folder, tracker, parent, rows, total, concurrent, stopped, wait_minutes, resources)
    # Tune's tables would hide the lines of SweepProgress, which reports each error in one, without its stack.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=search.budget,
            max_concurrent_trials=concurrent,
            reuse_actors=trains_itself(job.cluster),
            trial_name_creator=lambda trial: trial.config["trial"].name,
            trial_dirname_creator=lambda trial: trial.config["trial"].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.path),
            verbose=0,
            callbacks=[progress],
            failure_config=tune.FailureConfig(job.cluster.max_failures if trains_itself(job.cluster) else 0),
        ),
    )


def run_tune(job: TuneJob) -> list[TrialRow]:
    """The whole job: check every point, connect to the cluster, run the trials, record the comparison."""
    storage = absolute_storage(job.storage)
    sweep = prepare_sweep(job, storage)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        rows, _ = run_sweep(sweep, tracker)
    done = sum(row.status == "done" for row in rows)
    print(f"sweep: {done} of {len(rows)} trials done: {sweep.folder.path / 'sweep.json'}")
    return rows
