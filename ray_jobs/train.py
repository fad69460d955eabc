"""Train adapters on a frozen task model, for one N after the other.

python -m ray_jobs.train --backbone.model runs/task-model --num_inputs [2,4]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_jobs import cli
from ray_jobs.cluster import ClusterConfig, connected
from ray_jobs.paths import absolute_path, absolute_storage, store_in
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.feature_pass import fill_for
from ray_jobs.training.launch import Trained, launch, load_checked
from revmux.data.config import DataConfig
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.methods import method_class
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import CheckpointConfig, LossConfig, MethodConfig, OptimConfig, Recipe


@dataclass(frozen=True)
class TrainJob:
    """Settings of the job.

    Args:
        backbone: the frozen task model: a classifier with its head.
        data: the task.
        method: the system; its ``num_inputs`` is used where no list is given.
        num_inputs: N after N to train; one adapter folder each.
        optim: how weights move.
        loss: cross-entropy + λ · InfoNCE, and distillation.
        store: where the backbone's answers are kept.
        shuffles: groupings that the reported accuracy is a mean of.
        cluster: workers.
        tracking: MLflow.
        storage: folder of checkpoints, features and the default MLflow store; absolute, or relative to where the job runs.
        register: name of a registered model in MLflow; each adapter becomes a version of it, with its N, l, cost and
            accuracy as tags, which the server and ``mlflow.pyfunc.load_model`` load as ``models:/NAME/VERSION``.
        register_backbone: let each version bring a copy of a local task model, so that it predicts wherever MLflow
            loads it; without, whoever loads it must name the task model's folder.
        output: folder that takes one adapter folder for each N; by default ``adapters`` in the storage folder.
        checkpoint: when the run is saved, to go on from after a fault.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    num_inputs: list[int] | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 10
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    register: str | None = None
    register_backbone: bool = True
    output: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if method_class(self.method.name).is_plain:
            raise UserError(
                f"method.name is {self.method.name}, which has no adapters to train; tune a task model: python -m ray_jobs.finetune "
                f"--backbone.model {self.backbone.model}, or choose another method, such as revmux"
            )

    def recipes(self) -> dict[str, Recipe]:
        """A recipe for each N, by the name of its run."""
        recipes = {}
        for inputs in self.num_inputs or [self.method.num_inputs]:
            method = replace(self.method, num_inputs=inputs)
            name = f"{method.name}-n{inputs}-l{method.prefill_layers}"
            recipes[name] = Recipe(self.backbone, self.data, method, self.optim, self.loss, self.store, self.shuffles)
        return recipes


def train_adapters(job: TrainJob, tasks: dict[str, TaskData], tracker: Tracker, storage: Path) -> list[Trained]:
    """The job on a connected cluster, with its data read, one run after the other."""
    output = absolute_path(job.output, "output") if job.output else storage / "adapters"
    recipes, done = job.recipes(), []
    print(f"features: stored in {job.store.root}", flush=True)
    if job.cluster.workers > 1:  # else the one worker fills the store as well by itself
        fill_for(list(recipes.values()), next(iter(tasks.values())), job.cluster)
    for name, recipe in recipes.items():
        trained = launch(
            recipe, tasks[name], job.cluster, tracker, storage, name, output / name, checkpoint=job.checkpoint
        )
        metrics = trained.metrics
        print(
            f"{name}: accuracy {metrics['accuracy_mean']:.1%} ± {metrics['accuracy_std']:.1%} over {job.shuffles} "
            f"shuffles (SISO {metrics['siso_accuracy']:.1%}), agreement {metrics['siso_agreement']:.1%}, "
            f"cost {metrics['cost_counted']:.2f} of SISO: {trained.folder}"
        )
        if job.register:
            tags = {"method": recipe.method.name, "num_inputs": recipe.method.num_inputs}
            tags |= {"prefill_layers": recipe.method.prefill_layers}
            tags |= {key: f"{metrics[key]:.4f}" for key in ("accuracy_mean", "siso_accuracy", "cost_counted")}
            backbone = job.backbone.model if job.register_backbone else None
            pairs = "text_pair" in tasks[name].train.column_names
            version = tracker.register(trained.run_id, trained.folder, job.register, tags, backbone, pairs)
            print(f"registered: models:/{job.register}/{version}")
        done.append(trained)
    return done


def main(job: TrainJob) -> list[Trained]:
    """Train, evaluate and record one adapter for each N."""
    storage = absolute_storage(job.storage)
    job = replace(job, store=store_in(storage, job.store))
    job.cluster.check_training()
    tasks = {name: load_checked(recipe, job.cluster.workers) for name, recipe in job.recipes().items()}
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        return train_adapters(job, tasks, tracker, storage)


if __name__ == "__main__":
    sys.exit(cli.run(main, TrainJob, __doc__))
