"""Tune a backbone to a task: the SISO model, frozen from then on. A ready classifier skips this job.

python -m ray_jobs.finetune --data.source reviews.csv --output runs/task-model
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from ray_jobs import cli
from ray_jobs.cluster import ClusterConfig, connected
from ray_jobs.paths import absolute_path, absolute_storage
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.launch import Trained, launch, load_checked
from revmux.data.config import DataConfig
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.methods import Siso
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import CheckpointConfig, LossConfig, MethodConfig, OptimConfig, Recipe


@dataclass(frozen=True)
class FinetuneJob:
    """Settings of the job.

    Args:
        backbone: the pretrained model that is tuned.
        data: the task.
        optim: how weights move.
        frozen_layers: lowest layers, with the embeddings, that keep their weights; 0 tunes everything.
        cluster: workers.
        tracking: MLflow.
        storage: folder of checkpoints and of the default MLflow store; absolute, or relative to where the job runs.
        output: folder that the task model takes; by default ``task-model`` in the storage folder.
        name: of the run.
        soft_prompt: vectors that are put before every input of a language model and tuned in place of its weights, such
            as 20; takes ``--backbone.prompt``. 0 tunes the weights.
        checkpoint: when the run is saved, to go on from after a fault.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(epochs=3, learning_rate=1e-4))
    frozen_layers: int = 0
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    output: str | None = None
    name: str = "task-model"
    soft_prompt: int = 0
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def recipe(self) -> Recipe:
        """The job as a recipe: SISO with the backbone or a soft prompt tuned."""
        tuned = {"soft_prompt": self.soft_prompt} if self.soft_prompt else {"tune_backbone": True}
        method = MethodConfig(Siso.name, 1, self.frozen_layers, tuned)
        return Recipe(self.backbone, self.data, method, self.optim, LossConfig(infonce_weight=0.0), shuffles=1)


def tune_model(job: FinetuneJob, task: TaskData, tracker: Tracker, storage: Path) -> Trained:
    """The job on a connected cluster, with its data read."""
    output = absolute_path(job.output, "output") if job.output else storage / "task-model"
    trained = launch(job.recipe(), task, job.cluster, tracker, storage, job.name, output, checkpoint=job.checkpoint)
    print(f"task model: {trained.folder}, accuracy on the test split {trained.metrics['accuracy_mean']:.1%}")
    return trained


def main(job: FinetuneJob) -> Trained:
    """Tune, evaluate, record."""
    if job.backbone.dtype != "float32":
        raise UserError(
            f"dtype is {job.backbone.dtype}, but a task model is tuned in float32; leave --backbone.dtype out"
        )
    storage = absolute_storage(job.storage)
    job.cluster.check_training()
    task = load_checked(job.recipe(), job.cluster.workers)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        return tune_model(job, task, tracker, storage)


if __name__ == "__main__":
    sys.exit(cli.run(main, FinetuneJob, __doc__))
