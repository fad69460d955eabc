"""Settings of the quickstart. This module imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_jobs.cluster import ClusterConfig, check_port_number
from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe


@dataclass(frozen=True)
class QuickstartJob:
    """Settings of the quickstart. With the defaults it runs for minutes on two cores.

    Args:
        backbone: Pretrained model, or a classifier, which is not tuned again.
        data: Labelled text.
        tuning: Optimizer and schedule for tuning the task model.
        frozen_layers: Number of lowest layers that tuning leaves unchanged. 0 tunes the whole model.
        num_inputs: Widths N to train adapters for, as a list such as [2,4].
        prefill_layers: Number of prefill layers l, which each input passes alone.
        options: Options of the revmux method, as a mapping such as {own_state: mlp}.
        optim: Optimizer and schedule for training the adapters.
        loss: Training loss of the adapters.
        space: Search space of the sweep: quick, paper, wide, or a YAML file.
        sweep_trials: Maximum number of points of the space to try. At least 1.
        requests: Number of live requests to send to the server.
        cluster: Workers of each training run, and the Ray cluster that they run on.
        port: TCP port of the server during the quickstart, 1 to 65535.
        storage: Folder for everything that the quickstart writes.
        results: JSON file for the comparison. Default: results.json in the storage folder.
        plot: PNG file for the plot of accuracy against cost. Default: front.png in the storage folder.
    """

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(max_length=64))
    data: DataConfig = field(default_factory=lambda: DataConfig("docstrings", per_class=340))
    tuning: OptimConfig = field(default_factory=lambda: OptimConfig(epochs=2, learning_rate=2e-4))
    frozen_layers: int = 3
    num_inputs: list[int] = field(default_factory=lambda: [2, 4])
    prefill_layers: int = 3
    options: dict[str, Any] = field(default_factory=lambda: {"own_state": "mlp"})
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(epochs=10, batch_size=16, learning_rate=1e-3))
    loss: LossConfig = field(default_factory=lambda: LossConfig(distillation_weight=1.0))
    space: str = "quick"
    sweep_trials: int = 2
    requests: int = 64
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    port: int = 8000
    storage: str = "runs/quickstart"
    results: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        check_port_number(self.port)
        for name, least in (("frozen_layers", 0), ("prefill_layers", 0), ("sweep_trials", 1), ("requests", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; choose {least} or more")

    def recipe(self, model: str, method: MethodConfig, storage: Path) -> Recipe:
        """The recipe of a run on the frozen task model."""
        backbone = replace(self.backbone, model=model)
        store = StoreConfig(root=str(storage / "features"))
        return Recipe(backbone, self.data, method, self.optim, self.loss, store)
