"""Run a sweep: check its space, run its trials, and record the comparison."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.cluster import connected
from ray_jobs.paths import recording_storage, store_in
from ray_jobs.ray_internals import retry_out_of_memory_trials
from ray_jobs.sweep.comparison import record_comparison
from ray_jobs.sweep.concurrency import (
    describe_shortage,
    fitting_trials,
    trains_in_process,
    trial_placement,
    trial_resources,
    worker_nodes,
)
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.run_trial import run_trial
from ray_jobs.sweep.trials import SweepFolder, Trial, TrialRow, make_trials, mean_length
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.feature_pass import fill_stores_for
from revmux.data.task import TaskData, load_task
from revmux.features.tokens import TokenizedTask, tokenize_task
from revmux.methods import BackboneShape
from revmux.pretrained.identity import identity_of
from revmux.pretrained.loading import check_answers, outline
from revmux.training.config import Recipe
from revmux.training.recipe import check_rows
from revmux.utils.copies import join_location
from revmux.utils.redact import without_passwords
from tune_spaces.points import valid_points
from tune_spaces.space import SearchSpace, load_space

if TYPE_CHECKING:
    from ray.tune import Tuner

    from ray_jobs.sweep.search import FrontSearch


@dataclass(frozen=True)
class Sweep:
    """A sweep that is checked and ready to start.

    Attributes:
        job: settings of the sweep.
        space: search space.
        trials: every valid point, cheapest first.
        task: the task's data.
        folder: folder for the rows and trials.
        storage: absolute storage of the job.
    """

    job: TuneJob
    space: SearchSpace
    trials: list[Trial]
    task: TaskData
    folder: SweepFolder
    storage: str


def base_recipe(job: TuneJob) -> Recipe:
    """The settings that the space does not set."""
    return Recipe(
        job.backbone,
        job.data,
        optim=job.optim,
        loss=job.loss,
        store=job.store,
        shuffles=job.shuffles,
        name=job.recipe,
    )


def prepare_sweep(job: TuneJob, storage: str | Path, task: TaskData | None = None) -> Sweep:
    """Check everything that can be checked before a cluster starts.

    Args:
        job: settings of the sweep.
        storage: absolute storage.
        task: the data, if it is already loaded.

    Raises:
        UserError: the space has no valid point, the model has no head, the data cannot be read, or the sweep folder
            belongs to another task.
    """
    storage = str(storage)
    job = replace(job, store=store_in(storage, job.store))
    space = load_space(job.space)
    if job.trials is not None:
        space = replace(space, trials=job.trials)
    job.cluster.check_training()
    check_answers(job.backbone)
    backbone, own_labels = outline(job.backbone)
    points, left_out = valid_points(
        space, base_recipe(job), BackboneShape.of(backbone), job.cluster.workers, backbone.max_length
    )
    for reason in left_out:
        print(f"left out: {reason}", flush=True)
    task = task or load_task(job.data, own_labels)
    fitting = [point for point in points if point.method.num_inputs <= len(task.train)]
    check_rows(fitting or points, len(task.train))
    if len(fitting) < len(points):
        print(f"left out: every N above the {len(task.train)} rows of the train split", flush=True)
    points = fitting
    identity = {"data": task.identity["sha256"], "model": identity_of(job.backbone)["sha256"] or job.backbone.model}
    folder = SweepFolder(join_location(storage, f"sweeps/{job.name}"), identity)
    trials = make_trials(points, task, backbone, mean_length(job.backbone, task))
    return Sweep(job, space, trials, task, folder, storage)


def run_sweep(sweep: Sweep, tracker: Tracker) -> tuple[list[TrialRow], str]:
    """Run a sweep on the connected cluster and record it; returns its rows, cheapest first, and its MLflow run id."""
    job, folder = sweep.job, sweep.folder
    parent = folder.parent() if tracker.has_run(folder.parent()) else None
    settings = {"space": job.space, "points": len(sweep.trials), "sweep": sweep.space}
    with tracker.run(job.name, settings, resume=parent) as parent:
        folder.set_parent(parent)
        if not tracker.client.get_run(parent).inputs.dataset_inputs:
            tracker.log_data(parent, sweep.task.identity)
        rows = run_trials(sweep, tracker, parent)
        title = f"{sweep.task.identity['source']} on {job.backbone.model.rpartition('/')[2]}, selection set"
        try:
            record_comparison(tracker, parent, rows, folder.path, title)
        finally:
            folder.keep_own_files()
    return rows, parent


def run_trials(sweep: Sweep, tracker: Tracker, parent: str) -> list[TrialRow]:
    """Run the remaining trials with Ray Tune; rows of an earlier start are kept."""
    from ray_jobs.sweep.search import FrontSearch

    job, folder = sweep.job, sweep.folder
    rows = kept_rows(sweep)
    limit = sweep.space.trials
    search = FrontSearch(sweep.trials, list(rows.values()), limit, sweep.space.search == "optuna", sweep.space.seed)
    if rows:
        print(f"sweep: {len(rows)} trials ended in an earlier start, {search.budget} are left", flush=True)
    if search.budget:
        concurrent = concurrent_trials(job, search.budget)
        tokens = tokenize_task(sweep.task, job.backbone, job.store)
        recipes = [trial.recipe for trial in sweep.trials]
        fill_stores_for(recipes, tokens, job.cluster, concurrent * job.cluster.workers)
        folder.place.child("tune").remove_all()  # from an earlier start; the rows hold its results
        tuner = make_tuner(sweep, tokens, tracker, parent, rows, search, concurrent)
        with retry_out_of_memory_trials():
            tuner.fit()
    found = folder.read(sweep.trials)
    return [found[trial.name] for trial in sweep.trials if trial.name in found]


def kept_rows(sweep: Sweep) -> dict[str, TrialRow]:
    """The rows of an earlier start, without those of failed trials if they are to be retried."""
    rows = sweep.folder.read(sweep.trials)
    if sweep.job.retry_failed:
        for name in [name for name, row in rows.items() if row.status == "failed"]:
            sweep.folder.forget(rows.pop(name))
    return rows


def concurrent_trials(job: TuneJob, left: int) -> int:
    """The number of trials that run at the same time; warns if only one fits although more are left.

    Args:
        job: settings of the sweep.
        left: number of trials that are left.
    """
    if job.concurrent_trials is not None:
        return job.concurrent_trials
    nodes = worker_nodes(job.cluster)
    fitting = max(1, fitting_trials(job.cluster, nodes))
    if fitting == 1 and left > 1:
        print(
            f"sweep: warning: one trial runs at a time: {describe_shortage(job.cluster, nodes)}; on a cluster that grows, "
            "set --concurrent_trials",
            flush=True,
        )
    return fitting


def make_tuner(
    sweep: Sweep,
    tokens: TokenizedTask,
    tracker: Tracker,
    parent: str,
    rows: dict[str, TrialRow],
    search: FrontSearch,
    concurrent: int,
) -> Tuner:
    """Set up Ray Tune for the remaining trials.

    Args:
        sweep: the sweep.
        tokens: the tokens of its task.
        tracker: records the trials.
        parent: MLflow run of the sweep.
        rows: rows of an earlier start; rows are added as trials end.
        search: chooses the next trial.
        concurrent: number of trials that run at the same time.
    """
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    from ray_jobs.sweep.early_stopping import FrontScheduler
    from ray_jobs.sweep.reporting import SweepReporter

    job, folder = sweep.job, sweep.folder
    earlier_runs, curves = tracker.child_ids(parent), folder.curves(sweep.trials)
    parameters = {
        "task": tokens,
        "cluster": job.cluster,
        "tracking": TrackingConfig(tracker.uri, job.tracking.experiment),
        "storage": sweep.storage,
        "folder": folder,
        "parent": parent,
        "earlier_runs": earlier_runs,
        "command": tracker.command,
    }
    trainable = tune.with_resources(tune.with_parameters(run_trial, **parameters), trial_placement(job.cluster))
    scheduler = None
    if job.stopping.enabled:
        stopping = job.stopping
        ended = [trial for trial in sweep.trials if trial.name in rows and rows[trial.name].status != "failed"]
        inputs = len(sweep.task.selection)
        scheduler = FrontScheduler(
            inputs, stopping.grace, stopping.reduction, stopping.deviations, curves=curves, ended=ended
        )
    progress = SweepReporter(
        folder,
        tracker,
        earlier_runs,
        rows,
        curves,
        total=len(rows) + search.budget,
        concurrent=concurrent,
        stopped=scheduler.stopped if scheduler is not None else {},
        cluster=job.cluster,
        each=trial_resources(job.cluster),
    )
    # Tune's tables would hide the lines of SweepReporter, which prints each error on one line without a traceback.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # MLflow has the metrics. Tune itself reads only the files of its JSON logger at the end.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=search.budget,
            max_concurrent_trials=concurrent,
            reuse_actors=trains_in_process(job.cluster),
            trial_name_creator=lambda trial: trial.config["trial"].name,
            trial_dirname_creator=lambda trial: trial.config["trial"].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder.place.path,
            storage_filesystem=None if folder.place.local else folder.place.filesystem,
            verbose=0,
            callbacks=[JsonLoggerCallback(), progress],
            failure_config=tune.FailureConfig(job.cluster.max_failures),
        ),
    )


def run_tune(job: TuneJob) -> list[TrialRow]:
    """Run the whole job: check every point, connect to the cluster, run the trials, and record the comparison."""
    storage = recording_storage(job.storage, job.tracking.uri)
    sweep = prepare_sweep(job, storage)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        rows, _ = run_sweep(sweep, tracker)
    done = sum(row.status == "done" for row in rows)
    table = join_location(sweep.folder.location, "sweep.json")
    print(f"sweep: {done} of {len(rows)} trials done: {without_passwords(table)}")
    return rows
