"""Sweep N, l and λ: each trial a Ray Train run, all of them children of one MLflow run.

python -m ray_jobs.tune --backbone.model runs/task-model --space quick
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_jobs import cli
from ray_jobs.cluster import ClusterConfig, connected
from ray_jobs.comparison import record_comparison
from ray_jobs.features import fill_for
from ray_jobs.launch import absolute_storage
from ray_jobs.tracking import Tracker, TrackingConfig
from ray_jobs.trial_process import fitting_trials, run_trial, trains_itself, trial_resources
from ray_jobs.trials import SweepFolder, Trial, TrialRow, make_trials
from revmux.data import DataConfig, TaskData, load_task
from revmux.errors import UserError
from revmux.features import StoreConfig
from revmux.losses import LossConfig
from revmux.methods import BackboneShape
from revmux.pretrained import BackboneConfig, check_answers, identity_of, outline
from revmux.recipe import Recipe
from revmux.training import OptimConfig
from tune_spaces.space import SearchSpace, load_space


@dataclass(frozen=True)
class StoppingConfig:
    """Which trials are stopped before their end.

    Args:
        enabled: whether any is.
        grace: epochs that every trial may run.
        reduction: of the trials of one cost, ASHA lets the best of so many go on from each rung.
        deviations: a trial is stopped too if one that costs no more was at the same epoch more accurate by so many
            standard errors.
    """

    enabled: bool = True
    grace: int = 1
    reduction: float = 3.0
    deviations: float = 3.0

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise UserError(f"grace is {self.grace}; choose 1 epoch or more")
        if not self.reduction > 1:
            raise UserError(f"reduction is {self.reduction}; choose more than 1, such as 3")
        if not self.deviations > 0:
            raise UserError(f"deviations is {self.deviations}; choose more than 0, such as 3")


@dataclass(frozen=True)
class TuneJob:
    """Settings of the job.

    Args:
        backbone: the frozen task model.
        data: the task.
        space: quick, paper, wide, or a YAML file of your own.
        trials: at most so many points of the space; by default as many as the space says.
        optim: how weights move, where the space does not say.
        loss: what they move towards, where the space does not say.
        store: where the backbone's answers are kept; all trials share it.
        shuffles: groupings that each trial's accuracy is a mean of.
        stopping: which trials are stopped early.
        retry_failed: try again the trials that failed in an earlier start of the same sweep.
        cluster: workers of one trial.
        concurrent_trials: trials side by side; by default as many as the resources that are there now hold. On a
            cluster that scales with demand, name how many it may grow to.
        tracking: MLflow.
        storage: folder of checkpoints, trials and the default MLflow store.
        name: of the sweep; the same name on the same task model and data goes on from where it was.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    space: str = "quick"
    trials: int | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 3
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    retry_failed: bool = False
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(workers=1))
    concurrent_trials: int | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    name: str = "sweep"

    def __post_init__(self) -> None:
        for name in ("concurrent_trials", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more, or leave it out")


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
    """What the space does not say; a trial runs in a folder of its own, so the store is named from the root."""
    root = job.store.root
    store = job.store if "://" in root else replace(job.store, root=str(Path(root).expanduser().absolute()))
    return Recipe(job.backbone, job.data, optim=job.optim, loss=job.loss, store=store, shuffles=job.shuffles)


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
    space = load_space(job.space)
    if job.trials is not None:
        space = replace(space, trials=job.trials)
    job.cluster.check_training()
    check_answers(job.backbone)
    backbone, own_labels = outline(job.backbone)
    points, left_out = space.legal_points(base_recipe(job), BackboneShape.of(backbone), job.cluster.workers)
    for reason in left_out:
        print(f"left out: {reason}", flush=True)
    task = task or load_task(job.data, own_labels)
    identity = {"data": task.identity["sha256"], "model": identity_of(job.backbone)["sha256"] or job.backbone.model}
    folder = SweepFolder(storage / "sweeps" / job.name, identity)
    return Sweep(job, space, make_trials(points, task, backbone), task, folder, storage)


def main(job: TuneJob) -> list[TrialRow]:
    """Check every point, run the trials, record the comparison."""
    storage = absolute_storage(job.storage)
    sweep = prepare_sweep(job, storage)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster):
        rows, _ = run_sweep(sweep, tracker)
    done = sum(row.status == "done" for row in rows)
    print(f"sweep: {done} of {len(rows)} trials done: {sweep.folder.path / 'sweep.json'}")
    return rows


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
    import ray
    from ray import tune

    from ray_jobs.early_stopping import FrontScheduler
    from ray_jobs.memory_monitor import trials_may_be_ended
    from ray_jobs.progress import SweepProgress
    from ray_jobs.search import FrontSearch

    job, folder = sweep.job, sweep.folder
    rows = folder.read(sweep.trials)
    if job.retry_failed:
        for name in [name for name, row in rows.items() if row.status == "failed"]:
            folder.forget(rows.pop(name))
    limit = sweep.space.trials
    search = FrontSearch(sweep.trials, list(rows.values()), limit, sweep.space.search == "optuna", sweep.space.seed)
    if rows:
        print(f"sweep: {len(rows)} trials came to an end before, {search.budget} are left", flush=True)
    if search.budget:
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
        concurrent = job.concurrent_trials or fitting_trials(job.cluster, ray.cluster_resources())
        fill_for([trial.recipe for trial in sweep.trials], sweep.task, job.cluster, concurrent * job.cluster.workers)
        scheduler = None
        if job.stopping.enabled:
            scheduler = FrontScheduler(
                len(sweep.task.selection), job.stopping.grace, job.stopping.reduction, job.stopping.deviations
            )
        stopped = scheduler.stopped if scheduler is not None else {}
        progress = SweepProgress(
            folder,
            tracker,
            parent,
            rows,
            len(rows) + search.budget,
            concurrent,
            stopped,
            job.cluster.wait_minutes,
            resources,
        )
        # Tune's tables would hide the lines of SweepProgress, which tells each error in one, without its stack.
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
        shutil.rmtree(folder.path / "tune", ignore_errors=True)  # of an earlier start; what counts is in the rows
        tuner = tune.Tuner(
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
        with trials_may_be_ended():
            tuner.fit()
    found = folder.read(sweep.trials)
    return [found[trial.name] for trial in sweep.trials if trial.name in found]


if __name__ == "__main__":
    sys.exit(cli.run(main, TuneJob, __doc__))
