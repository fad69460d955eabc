"""Settings of the jobs that train and evaluate. This module imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ray_jobs.cluster import ClusterConfig
from ray_jobs.tracking.config import TrackingConfig
from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import PLAIN_METHOD, CheckpointConfig, LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipes import DEFAULT_RECIPE, named_recipe


@dataclass(frozen=True)
class FinetuneJob:
    """Settings of the job.

    Args:
        backbone: Pretrained model to tune.
        data: Labelled text.
        optim: Optimizer and schedule.
        frozen_layers: Number of lowest layers that keep their weights, together with the embeddings. 0 tunes the whole
            model.
        cluster: Workers and the Ray cluster that they run on.
        tracking: MLflow tracking.
        storage: Folder for checkpoints and the default MLflow store, or a URI such as s3://bucket/runs, with which
            tracking.uri must be set. In a submitted job it must not be a relative path.
        output: Folder or URI for the task model. Default: task-model in the storage.
        name: Name of the run. A run with the same name and the same settings resumes from its last checkpoint.
        soft_prompt: Number of trainable vectors to put before every input of a language model, such as 20. They are
            tuned instead of the model's weights. Requires --backbone.prompt. 0 tunes the weights.
        lora_rank: Rank of LoRA, such as 16. The result is then a PEFT adapter on the unchanged model: low-rank updates of
            the layers above frozen_layers, and a classification head. Needs revmux[peft]. 0 tunes the weights.
        checkpoint: When to save checkpoints.
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
    lora_rank: int = 0
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name in ("frozen_layers", "soft_prompt", "lora_rank"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if self.lora_rank and (self.soft_prompt or self.backbone.prompt is not None):
            raise UserError(
                f"lora_rank is {self.lora_rank}, which trains a classification head, but "
                f"{'soft_prompt' if self.soft_prompt else 'backbone.prompt'} is set, too; set one of them"
            )

    def recipe(self) -> Recipe:
        """The job's recipe: SISO with its backbone, LoRA or a soft prompt tuned."""
        tuned: dict[str, Any] = {"tune_backbone": True}
        if self.soft_prompt:
            tuned = {"soft_prompt": self.soft_prompt}
        elif self.lora_rank:
            tuned = {"peft_rank": self.lora_rank}
        method = MethodConfig(PLAIN_METHOD, 1, self.frozen_layers, tuned)
        return Recipe(self.backbone, self.data, method, self.optim, LossConfig(infonce_weight=0.0), shuffles=1)


@dataclass(frozen=True)
class FeaturesJob:
    """Settings of the job.

    Args:
        backbone: Frozen task model.
        data: Labelled text. Use the settings that training will use, because the splits determine what is stored.
        layers: Layers at which to store hidden states, as a list such as [2,3]: every number of prefill layers that
            will be trained. Valid values: 0 to the number of layers. The teacher's scores are always stored.
        store: Feature store. On several machines, set a root that all of them can reach: a shared folder or a URI.
        cluster: Workers and the Ray cluster that they run on.
        storage: Folder or URI for the stores, unless store.root is set. In a submitted job it must not be a relative path.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layers: list[int] = field(default_factory=lambda: [2])
    store: StoreConfig = field(default_factory=StoreConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    storage: str = "runs"


@dataclass(frozen=True)
class TrainJob:
    """Settings of the job.

    Args:
        backbone: Frozen task model: a classifier with its head.
        data: Labelled text.
        method: Method to train. Its num_inputs applies only if num_inputs below is not set.
        num_inputs: Widths N to train, one adapter each, as a list such as [2,4]. Default: method.num_inputs alone.
        optim: Optimizer and schedule.
        loss: Training loss: cross-entropy + λ · InfoNCE + distillation.
        store: Feature store for the frozen model's states.
        shuffles: Number of random groupings of the test split to average the reported accuracy over. At least 1.
        cluster: Workers and the Ray cluster that they run on.
        tracking: MLflow tracking.
        storage: Folder for checkpoints, features and the default MLflow store, or a URI such as s3://bucket/runs, with
            which tracking.uri must be set. In a submitted job it must not be a relative path.
        register: Name of a registered model in MLflow. Each adapter becomes a version of it, tagged with its N, l, cost
            and accuracy. The server and mlflow.pyfunc.load_model load it as models:/NAME/VERSION. Default: adapters are
            not registered.
        register_backbone: Whether to copy a local task model into each registered version, so that any machine can load the
            version. If false, the user must name the task model's folder when loading a version.
        output: Folder for the adapters, with one subfolder per N. Default: adapters in the storage folder.
        checkpoint: When to save checkpoints.
        recipe: Named recipe: strong, paper, or a YAML file. It supplies the optimizer, the loss and the method's options,
            which the other settings override one by one.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    num_inputs: list[int] | None = None
    optim: OptimConfig = field(default_factory=lambda: named_recipe().optim_config())
    loss: LossConfig = field(default_factory=lambda: named_recipe().loss_config())
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 10
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    register: str | None = None
    register_backbone: bool = True
    output: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recipe: str = DEFAULT_RECIPE

    def __post_init__(self) -> None:
        if self.method.name == PLAIN_METHOD:
            raise UserError(
                f"method.name is {PLAIN_METHOD}, which has no adapters to train; tune a task model: revmux finetune "
                f"--backbone.model {self.backbone.model}, or choose another method, such as revmux"
            )
        if self.shuffles < 1:
            raise UserError(f"shuffles is {self.shuffles}; choose 1 or more")

    def recipes(self) -> dict[str, Recipe]:
        """One recipe per N, by the name of its run."""
        recipes = {}
        options = named_recipe(self.recipe).options_of(self.method.name, self.method.options)
        for inputs in self.num_inputs or [self.method.num_inputs]:
            method = replace(self.method, num_inputs=inputs, options=options)
            name = f"{method.name}-n{inputs}-l{method.prefill_layers}"
            recipes[name] = Recipe(
                self.backbone, self.data, method, self.optim, self.loss, self.store, self.shuffles, self.recipe
            )
        return recipes


@dataclass(frozen=True)
class EvaluateJob:
    """Settings of the job.

    Args:
        adapter: Adapter folder on a disk that the worker can reach, its URI, or an id on the Hugging Face hub.
        backbone: Task model that the adapter was trained on.
        data: Labelled text. The test split is evaluated.
        store: Feature store for the task model's states of the test split. Each input then runs through the lower
            layers once, regardless of the number of shuffles, or not at all if training has already stored its states.
        shuffles: Number of random groupings of the test split to average the accuracy over. At least 1.
        seed: Random seed of the groupings.
        cluster: Resources of the one worker that evaluates, and the Ray cluster that it runs on.
        tracking: MLflow tracking.
        storage: Folder for features and the default MLflow store, or a URI such as s3://bucket/runs, with which
            tracking.uri must be set. In a submitted job it must not be a relative path.
        output: JSON file for the metrics. Default: evaluate-ADAPTER.json in the storage folder.
    """

    adapter: str
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 10
    seed: int = 0
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    output: str | None = None

    def __post_init__(self) -> None:
        if self.shuffles < 1:
            raise UserError(f"shuffles is {self.shuffles}; choose 1 or more")
