"""Accuracy on the embedded task with the real small encoder: every system, every N, several seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rows import kept_rows
from benchmarks.systems.families import measure_backbone
from benchmarks.systems.grid import SYSTEMS, exit_head
from benchmarks.trained import Run, fill_store, over_seeds, siso_row, train_missing, tuned_task_model
from revmux.data.config import DataConfig
from revmux.data.task import TaskData, load_task
from revmux.estimate.throughput import like_length_batches
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import LossConfig, OptimConfig, Recipe

MAX_LENGTH, TIMED_INPUTS, BATCH = 64, 96, 32


@dataclass(frozen=True)
class Budget:
    """How much data and training every system gets.

    Attributes:
        per_class: sentences per class of the embedded task.
        epochs: passes over the training split.
        exit_head_epochs: epochs of exit heads, which cost almost nothing.
        tuned_epochs: epochs of systems that tune the backbone, which cost several times as much.
        learning_rate: peak learning rate of AdamW.
        tuned_learning_rate: peak learning rate if the backbone is tuned too.
        batch_size: inputs per step, rounded to a multiple of N.
        seeds: runs per system.
        shuffles: groupings of the test split per run.
    """

    per_class: int = 500
    epochs: int = 3
    exit_head_epochs: int = 9
    tuned_epochs: int = 2
    learning_rate: float = 1e-3
    tuned_learning_rate: float = 2e-4
    batch_size: int = 16
    seeds: int = 3
    shuffles: int = 4


def all_runs(budget: Budget, task: TaskData, model: Path, num_layers: int, folder: Path) -> list[Run]:
    """Return every system at every N with every seed, ordered by seed."""
    backbone, data = (
        BackboneConfig(str(model), max_length=MAX_LENGTH),
        DataConfig("docstrings", per_class=budget.per_class),
    )
    store = StoreConfig(root=str(folder / "features"))
    runs = []
    for seed in range(budget.seeds):
        for system in [*SYSTEMS, *map(exit_head, range(1, num_layers))]:
            for num_inputs in system.widths:
                method, epochs = system.config(num_inputs, num_layers), budget.epochs
                if system.tuned:
                    epochs = budget.tuned_epochs
                if system.exit_layer is not None:
                    epochs = budget.exit_head_epochs
                rate = budget.tuned_learning_rate if system.tuned else budget.learning_rate
                batch_size = round(budget.batch_size / num_inputs) * num_inputs  # a whole number of groups
                optim = OptimConfig(epochs, batch_size, rate, seed=seed)
                recipe = Recipe(backbone, data, method, optim, LossConfig(), store, budget.shuffles)
                runs.append(Run.named(system.title, recipe, task, folder / "runs"))
    return runs


def measure(budget: Budget, folder: Path, pairs: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Train the runs that have no result yet, and time every system.

    Args:
        budget: how much data and training every system gets.
        folder: folder of the task model, the features and the results.
        pairs: number of paired timings per system.

    Returns:
        The rows, the identity of the data, and the identity of the task model.
    """
    data = DataConfig("docstrings", per_class=budget.per_class)
    task = load_task(data)
    tuning = OptimConfig(epochs=4, batch_size=32, learning_rate=1e-4)
    model = tuned_task_model(BackboneConfig(max_length=MAX_LENGTH), data, task, tuning, 0, folder)
    pretrained = load_pretrained(BackboneConfig(str(model), max_length=MAX_LENGTH))
    num_layers = pretrained.backbone.num_layers
    runs = all_runs(budget, task, model, num_layers, folder)
    if not all(run.is_done for run in runs):
        for split in (task.train, task.selection, task.test):
            fill_store(runs[0].recipe, split, list(range(1, num_layers)))
        train_missing(runs, task)
    rows = over_seeds(runs)
    tokens = pretrained.tokenize(task.test, MAX_LENGTH)
    batches = like_length_batches(tokens, TIMED_INPUTS, BATCH)
    measured = partial(measure_backbone, pretrained.backbone, batches, pairs)
    ratios = kept_rows(folder / "timed", "task-model", (str(model), TIMED_INPUTS, BATCH, pairs, SYSTEMS), measured)
    rows = [row | ratios[f"{row['title']} N={row['num_inputs']}"] for row in rows]
    return [siso_row(rows[0]["siso_accuracy"]), *rows], task.identity, pretrained.identity
