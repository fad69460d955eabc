"""Sweep N, l and λ: each trial a Ray Train run, all of them children of one MLflow run.

python -m ray_jobs.tune --backbone.model runs/task-model --space quick
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_jobs import cli
from ray_jobs.cluster import ClusterConfig, connected
from ray_jobs.launch import absolute_storage, fingerprint, launch
from ray_jobs.tracking import Tracker, TrackingConfig
from revmux.data import DataConfig, TaskData, load_task
from revmux.errors import UserError
from revmux.features import StoreConfig
from revmux.losses import LossConfig
from revmux.pretrained import BackboneConfig, check_answers, inspect
from revmux.recipe import Recipe
from revmux.results import write_json
from revmux.training import OptimConfig
from tune_spaces.space import load_space


@dataclass(frozen=True)
class TuneJob:
    """Settings of the job.

    Args:
        backbone: the frozen task model.
        data: the task.
        space: quick, paper, wide, or a YAML file of your own.
        trials: at most so many points of the space, drawn by its seed; by default as many as the space says.
        optim: how weights move, where the space does not say.
        loss: what they move towards, where the space does not say.
        store: where the backbone's answers are kept; all trials share it.
        shuffles: groupings that each trial's accuracy is a mean of.
        cluster: workers of one trial.
        concurrent_trials: trials side by side; by default as many as the resources that are there now hold. On a
            cluster that scales with demand, name how many it may grow to.
        tracking: MLflow.
        storage: folder of checkpoints, trials and the default MLflow store.
        name: of the sweep; the same name with the same space goes on from where it was.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    space: str = "quick"
    trials: int | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 3
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


def run_trial(
    point: dict[str, Any], task: TaskData, cluster: ClusterConfig, tracking: TrackingConfig, storage: Path, parent: str
) -> None:
    """One trial: the driver of a Ray Train run, reporting its last figures to Tune.

    Args:
        point: ``{"trial": (name, recipe)}``.
        task: the data, which Tune hands over by its object store.
        cluster: workers of the trial.
        tracking: with the URI spelled out.
        storage: of the sweep.
        parent: MLflow run of the sweep.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    name, recipe = point["trial"]
    output, tracker = storage / "trials" / name, Tracker(tracking, storage)
    trained = launch(recipe, task, cluster, tracker, storage, name, output, parent, [TuneReportCallback()])
    tune.report(trained.metrics | {"adapter": str(trained.folder), "run_id": trained.run_id})


def trial_name(recipe: Recipe, task: TaskData) -> str:
    """Readable and unique within a sweep."""
    method = recipe.method
    return f"{method.name}-n{method.num_inputs}-l{method.prefill_layers}-{fingerprint(recipe, task)[:4]}"


def main(job: TuneJob) -> list[dict[str, Any]]:
    """Check every point, run the trials, record the comparison."""
    storage = absolute_storage(job.storage)
    space = load_space(job.space)
    if job.trials is not None:
        space = replace(space, trials=job.trials)
    job.cluster.check_here()
    check_answers(job.backbone)
    shape, own_labels = inspect(job.backbone)
    base = Recipe(job.backbone, job.data, optim=job.optim, loss=job.loss, store=job.store, shuffles=job.shuffles)
    points = space.check(base, shape, job.cluster.workers)
    task = load_task(job.data, own_labels)
    tracker = Tracker(job.tracking, storage)
    tracking = TrackingConfig(tracker.uri, job.tracking.experiment)
    trials = [(trial_name(point, task), point) for point in points]
    points_hash = hashlib.sha256(" ".join(name for name, _ in trials).encode()).hexdigest()[:8]
    folder = storage / "sweeps" / f"{job.name}-{points_hash}"
    with tracker.run(job.name, {"space": job.space, "points": len(points), "recipe": base}) as parent:
        tracker.log_data(parent, task.identity)
        with connected(job.cluster):
            rows = run_trials(trials, task, job.cluster, tracking, folder, parent, job.concurrent_trials)
        write_json(folder / "sweep.json", rows)
        best = max((row for row in rows if row["status"] == "done"), key=lambda row: row["accuracy_mean"], default=None)
        if best is not None:
            tracker.log_metrics(parent, {name: best[name] for name in ("accuracy_mean", "cost_counted")})
        tracker.client.log_artifact(parent, str(folder / "sweep.json"))
    if best is None:
        raise UserError(f"none of the {len(rows)} trials finished; their errors are in {folder / 'tune'}")
    print(f"sweep: {sum(row['status'] == 'done' for row in rows)} of {len(rows)} trials done: {folder / 'sweep.json'}")
    return rows


def run_trials(
    trials: list[tuple[str, Recipe]],
    task: TaskData,
    cluster: ClusterConfig,
    tracking: TrackingConfig,
    folder: Path,
    parent: str,
    concurrent: int | None = None,
) -> list[dict[str, Any]]:
    """All trials by Ray Tune, ``concurrent`` at a time or as the resources allow; finished ones of an earlier try are kept."""
    import ray
    from ray import tune

    from ray_jobs.progress import SweepProgress

    parameters = {
        "task": task,
        "cluster": cluster,
        "tracking": tracking,
        "storage": folder,
        "parent": parent,
    }
    # The driver of a trial only waits, its workers hold the cores; Tune wants something for it, so a byte of memory.
    trainable = tune.with_resources(tune.with_parameters(run_trial, **parameters), {"memory": 1})
    present = ray.cluster_resources()
    fitting = present.get("CPU", 0) // (cluster.cpus_per_worker * cluster.workers)
    if cluster.use_gpu:
        fitting = min(fitting, present.get("GPU", 0) // (cluster.gpus_per_worker * cluster.workers))
    param_space = {"trial": tune.grid_search(trials)}
    state = folder / "tune"
    if tune.Tuner.can_restore(str(state)):
        tuner = tune.Tuner.restore(
            str(state), trainable, param_space=param_space, resume_unfinished=True, restart_errored=True
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent or max(1, int(fitting)),
                trial_name_creator=lambda trial: trial.config["trial"][0],
                trial_dirname_creator=lambda trial: trial.config["trial"][0],
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(folder), verbose=0, callbacks=[SweepProgress(len(trials))]
            ),
        )
    return [_row(result) for result in tuner.fit()]


def _row(result: Any) -> dict[str, Any]:
    name, recipe = result.config["trial"]
    row: dict[str, Any] = {
        "trial": name,
        "method": recipe.method.name,
        "num_inputs": recipe.method.num_inputs,
        "prefill_layers": recipe.method.prefill_layers,
        "infonce_weight": recipe.loss.infonce_weight,
        "learning_rate": recipe.optim.learning_rate,
        "status": "failed" if result.error else "done",
    }
    kept = (
        "accuracy_mean",
        "accuracy_std",
        "siso_accuracy",
        "siso_agreement",
        "cost_counted",
        "tunable_params",
        "adapter",
        "run_id",
    )
    return row | {key: (result.metrics or {}).get(key) for key in kept}


if __name__ == "__main__":
    sys.exit(cli.run(main, TuneJob, __doc__))
