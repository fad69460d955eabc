"""The tasks of the plans: how many inputs are used to train and to choose, and the systems that compete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trained import tuned_task_model
from revmux.data.config import DataConfig
from revmux.data.task import TaskData, load_task
from revmux.features.config import StoreConfig
from revmux.plan.build import for_choosing
from revmux.plan.config import SplitConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import exit_head_config


@dataclass(frozen=True)
class Budget:
    """How much training is done, and the systems to choose from.

    Attributes:
        max_length: tokens to which an input is truncated.
        frozen_layers: number of lowest layers that keep their pretrained weights in the task model.
        tuning_epochs: epochs of the task model.
        epochs: epochs of the adapters; exit heads get three times as many.
        exit_layers: layers at which the exit heads read.
        prefill_layers: l of the adapters, all with N = 2.
    """

    max_length: int = 64
    frozen_layers: int = 3
    tuning_epochs: int = 2
    epochs: int = 2
    exit_layers: tuple[int, ...] = (1, 2, 3, 4, 5)
    prefill_layers: tuple[int, ...] = (3, 4, 5)


@dataclass(frozen=True)
class Planned:
    """A task with everything that its plan needs.

    Attributes:
        name: name of the task.
        task: the data; its test split is used to verify.
        choosing: the same data with a slice of train (the selection set) in place of the test split.
        recipes: the systems that compete, on one frozen task model.
        folder: folder of everything that is kept.
    """

    name: str
    task: TaskData
    choosing: TaskData
    recipes: list[Recipe]
    folder: Path


def plan_task(
    name: str,
    data: DataConfig,
    splitting: SplitConfig,
    budget: Budget,
    kept: Path,
    source: BackboneConfig | None = None,
) -> Planned:
    """Load a task, split it, and tune the task model on the inputs that are not in the selection set.

    Args:
        name: name of the task.
        data: settings of the task.
        splitting: how the selection set is split off.
        budget: how much training is done.
        kept: folder of all tasks; a task model that an earlier run tuned is reused.
        source: model to tune; by default the embedded one.
    """
    task, folder = load_task(data), kept / name
    choosing = for_choosing(task, splitting)
    backbone = source or BackboneConfig(max_length=budget.max_length)
    tuning = OptimConfig(budget.tuning_epochs, 32, 2e-4)
    model = tuned_task_model(backbone, data, choosing, tuning, budget.frozen_layers, folder)
    frozen = BackboneConfig(str(model), max_length=budget.max_length)
    store = StoreConfig(root=str(folder / "features"))
    return Planned(name, task, choosing, list(_recipes(frozen, data, store, budget)), folder)


def _recipes(backbone: BackboneConfig, data: DataConfig, store: StoreConfig, budget: Budget) -> Iterator[Recipe]:
    for layer in budget.exit_layers:
        head = exit_head_config(layer)
        optim = OptimConfig(3 * budget.epochs, 16, 1e-3)
        yield Recipe(backbone, data, head, optim, LossConfig(infonce_weight=0.0, distillation_weight=1.0), store, 1)
    for layer in budget.prefill_layers:
        revmux = MethodConfig("revmux", 2, layer, {"own_state": "linear"})
        yield Recipe(
            backbone, data, revmux, OptimConfig(budget.epochs, 16, 1e-3), LossConfig(distillation_weight=1.0), store, 1
        )
