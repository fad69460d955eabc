"""Settings of the quickstart. This module imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_jobs.cluster import ClusterConfig, check_port_number
from ray_jobs.planning.config import PlanJob
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.training.config import FinetuneJob
from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipes import DEFAULT_RECIPE, named_recipe
from tune_spaces.space import adapted_options

NAME = "quickstart"
"""Name of the quickstart's plan, of its comparison, and of its registered model."""


@dataclass(frozen=True)
class QuickstartJob:
    """Settings of the quickstart. With the defaults it takes minutes on two cores.

    Args:
        backbone: Pretrained model, or a classifier, which is used as is.
        data: Labelled text.
        tuning: Optimizer and schedule for tuning the task model.
        frozen_layers: Number of lowest layers that tuning leaves unchanged. 0 tunes the whole model.
        num_inputs: Widths N to train adapters for, as a list such as [2,4].
        prefill_layers: Number of prefill layers l, through which each input runs alone. Default: half of the layers.
        exit_layers: Layers of the exit heads, as a list such as [2,4]. Default: a third, a half and two thirds of the way up.
        exit_adapted: Number of layers below each exit that LoRA adapts for it. 0 keeps all layers frozen.
        recipe: Named recipe: strong, paper, or a YAML file. It supplies the loss, the optimizer and the options of the methods.
        optim: Optimizer and schedule for training the adapters and exit heads.
        loss: Training loss of the adapters. Exit heads are trained without InfoNCE.
        goal: Goal of the plan: the allowed loss of accuracy, or the required throughput.
        choosing: Slice of the training data that is held back from training and used to choose the system.
        measure: How the plan measures systems on this machine.
        shuffles: Number of groupings to average the reported accuracy over. At least 1.
        requests: Number of live requests to send to the server.
        cluster: Workers of each training run, and the Ray cluster that they run on.
        port: TCP port of the server during the quickstart, 1 to 65535.
        storage: Folder for everything that the quickstart writes.
        results: JSON file for the comparison. Default: results.json in the storage folder.
        plot: PNG file for the plot of accuracy against cost. Default: front.png in the storage folder.
    """

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(max_length=64))
    data: DataConfig = field(default_factory=lambda: DataConfig(limit=7500, selection_share=0.03, test_share=0.08))
    tuning: OptimConfig = field(default_factory=lambda: OptimConfig(epochs=1, batch_size=32, learning_rate=3e-4))
    frozen_layers: int = 0
    num_inputs: list[int] = field(default_factory=lambda: [2, 4])
    prefill_layers: int | None = None
    exit_layers: list[int] | None = None
    exit_adapted: int = 0
    recipe: str = DEFAULT_RECIPE
    optim: OptimConfig = field(default_factory=lambda: named_recipe().optim_config(epochs=4, batch_size=32))
    loss: LossConfig = field(default_factory=lambda: named_recipe().loss_config())
    goal: Goal = field(default_factory=lambda: Goal(allowance=1.0))
    choosing: SplitConfig = field(default_factory=SplitConfig)
    measure: MeasureConfig = field(
        default_factory=lambda: MeasureConfig(shuffles=2, max_stages=2, throughput_inputs=128, throughput_pairs=3)
    )
    shuffles: int = 2
    requests: int = 128
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    port: int = 8000
    storage: str = "runs/quickstart"
    results: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        check_port_number(self.port)
        for name, least in (
            ("frozen_layers", 0),
            ("prefill_layers", 0),
            ("exit_adapted", 0),
            ("shuffles", 1),
            ("requests", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; choose {least} or more")

    def tuning_job(self, tracking: TrackingConfig, storage: Path) -> FinetuneJob:
        """The job that tunes the task model."""
        return FinetuneJob(
            self.backbone, self.data, self.tuning, self.frozen_layers, self.cluster, tracking, str(storage)
        )

    def plan_job(self, model: str, tracking: TrackingConfig, storage: Path) -> PlanJob:
        """The plan on the frozen task model. Each adapter is trained by one process, several of them at a time."""
        return PlanJob(
            backbone=replace(self.backbone, model=model),
            data=self.data,
            goal=self.goal,
            choosing=self.choosing,
            measure=self.measure,
            optim=self.optim,
            loss=self.loss,
            store=StoreConfig(root=str(storage / "features")),
            shuffles=1,
            cluster=replace(self.cluster, workers=1),
            tracking=tracking,
            recipe=self.recipe,
            storage=str(storage),
            name=NAME,
            register=NAME,
            port=self.port,
        )

    def recipes(self, plan: PlanJob, exit_layers: Sequence[int], prefill_layers: int) -> list[Recipe]:
        """The runs on the task model: RevMUX for each N, which take longest and therefore start first, and the exit heads."""
        named = named_recipe(self.recipe)
        base = Recipe(
            plan.backbone,
            plan.data,
            optim=self.optim,
            loss=self.loss,
            store=plan.store,
            shuffles=plan.shuffles,
            name=self.recipe,
        )
        mixers = [
            replace(base, method=MethodConfig("revmux", n, prefill_layers, named.options_of("revmux")))
            for n in sorted(self.num_inputs)
        ]
        without_infonce = replace(base, loss=replace(self.loss, infonce_weight=0.0))
        options = named.options_of("exit-head")
        options |= adapted_options(options, self.exit_adapted)
        heads = [
            replace(
                without_infonce,
                method=MethodConfig("exit-head", 1, max(0, layer - self.exit_adapted), options | {"layer": layer}),
            )
            for layer in exit_layers
        ]
        return [*mixers, *heads]
