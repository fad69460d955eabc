"""The tasks that are planned for: how much trains, how much chooses, and the systems that compete."""

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
    """How much is learnt from, and from what is chosen.

    Attributes:
        max_length: tokens an input is cut to.
        frozen_layers: lowest layers that the task model keeps as they were pretrained.
        tuning_epochs: of the task model.
        epochs: of adapters; exit heads get three times as many.
        exit_layers: layers that exit heads leave at.
        prefill_layers: l of the adapters, all at N = 2.
    """

    max_length: int = 64
    frozen_layers: int = 3
    tuning_epochs: int = 2
    epochs: int = 2
    exit_layers: tuple[int, ...] = (1, 2, 3, 4, 5)
    prefill_layers: tuple[int, ...] = (3, 4, 5)


@dataclass(frozen=True)
class Planned:
    """A task with all that a plan for it needs.

    Attributes:
        name: of the task.
        task: its test split verifies.
        choosing: the same with a slice of train where the test split was.
        recipes: the systems that compete, on one frozen task model.
        folder: of everything that is kept.
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
    """Read a task, divide it, and tune the task model on what does not choose.

    Args:
        name: of the task.
        data: where it is.
        splitting: the inputs that choose.
        budget: how much is learnt from.
        kept: folder of all tasks; what an earlier start tuned is kept.
        source: model that is tuned; by default the embedded one.
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
        revmux = MethodConfig("revmux", 2, layer, {"skip": True})
        yield Recipe(
            backbone, data, revmux, OptimConfig(budget.epochs, 16, 1e-3), LossConfig(distillation_weight=1.0), store, 1
        )
