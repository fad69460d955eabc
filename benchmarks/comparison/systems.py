"""What is compared: a task with its frozen model, the systems on it, and one run per system and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.trained import Run
from revmux.data.config import DataConfig
from revmux.data.task import TaskData
from revmux.features.config import StoreConfig
from revmux.methods import method_class
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import LossConfig, MethodConfig, Recipe
from revmux.training.recipes import named_recipe


@dataclass(frozen=True)
class Ready:
    """A task with its frozen model.

    Attributes:
        name: name of the task.
        task: the data; its test split is reported.
        choosing: the same with the choosing set as its test split; adapters are trained on its train split.
        data: settings of the data.
        backbone: the frozen model.
        store: where features are stored.
        folder: folder of everything that is kept.
    """

    name: str
    task: TaskData
    choosing: TaskData
    data: DataConfig
    backbone: BackboneConfig
    store: StoreConfig
    folder: Path


@dataclass(frozen=True)
class System:
    """One row of a comparison.

    Attributes:
        title: what distinguishes it, unique for each N.
        method: the method; the recipe's options are added.
        recipe: the named recipe.
        loss: settings that differ from the recipe's loss.
        options: whether the recipe's options apply.
        seeds: number of runs.
        ablation: whether it belongs to the ablation, which is measured on one task and is not planned with.
        first: whether all its seeds run before the systems that are not marked.
    """

    title: str
    method: MethodConfig
    recipe: str = "strong"
    loss: dict[str, Any] = field(default_factory=dict)
    options: bool = True
    seeds: int = 3
    ablation: bool = False
    first: bool = False


def build_recipe(system: System, ready: Ready, epochs: int, seed: int, shuffles: int, **optim: Any) -> Recipe:
    """The recipe of one run.

    Args:
        system: what is trained.
        ready: the task.
        epochs: epochs of training.
        seed: its seed.
        shuffles: random groupings of the test split.
        optim: settings of the optimizer that differ from those of the named recipe.
    """
    named, method = named_recipe(system.recipe), system.method
    if system.options:
        method = replace(method, options=named.options_of(method.name, method.options))
    loss = dict(system.loss)
    if not method_class(method.name).matches_teacher:
        loss["infonce_weight"] = 0.0
    return Recipe(
        ready.backbone,
        ready.data,
        method,
        named.optim_config(epochs=epochs, seed=seed, **optim),
        LossConfig(**{**named.loss, **loss}),
        ready.store,
        shuffles,
        system.recipe,
    )


def named_runs(
    chosen: Sequence[System], ready: Ready, seeds: int, recipe_of: Callable[[System, Ready, int], Recipe]
) -> list[tuple[System, Run]]:
    """All runs of a task: those of the marked systems first, and one seed of each system before the next seed.

    Args:
        chosen: the systems.
        ready: the task.
        seeds: most runs per system.
        recipe_of: the recipe of a system, a task and a seed.
    """
    found = [
        (
            system,
            Run.named(
                f"{'ablation ' * system.ablation}{system.title}",
                recipe_of(system, ready, seed),
                ready.choosing,
                ready.folder / "runs",
            ),
        )
        for seed in range(seeds)
        for system in chosen
        if seed < system.seeds
    ]
    return sorted(found, key=lambda one: not one[0].first)
