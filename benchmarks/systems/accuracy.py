"""Accuracy on the embedded task with the real small encoder: every system, every N, several seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems.grid import SYSTEMS, System, exit_head
from revmux.data import DataConfig, TaskData, load_task
from revmux.features import StoreConfig
from revmux.losses import LossConfig
from revmux.pretrained import BackboneConfig, load_pretrained
from revmux.recipe import MethodConfig, Recipe, fill_store, prepare, train_here
from revmux.results import write_json
from revmux.training import OptimConfig


@dataclass(frozen=True)
class Budget:
    """How much every system may learn from; the same for all.

    Attributes:
        per_class: sentences a class of the embedded task.
        epochs: passes over the training split.
        batch_size: inputs a step.
        seeds: runs of each system.
        shuffles: groupings of the test split a run.
        threads: of one run.
        processes: runs at once.
    """

    per_class: int = 500
    epochs: int = 3
    batch_size: int = 16
    seeds: int = 3
    shuffles: int = 4
    threads: int = 1
    processes: int = 2

    def data(self) -> DataConfig:
        """The task."""
        return DataConfig(per_class=self.per_class)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        system: what is trained.
        num_inputs: N.
        seed: of weights, order and groups.
    """

    system: System
    num_inputs: int
    seed: int

    @property
    def name(self) -> str:
        """File name of its result."""
        words = f"{self.system.title} N={self.num_inputs} seed={self.seed}"
        return "".join(letter if letter.isalnum() or letter == "=" else "-" for letter in words)


def tuned_task_model(budget: Budget, task: TaskData, folder: Path) -> Path:
    """The SISO model that every system stands on, tuned once."""
    output = folder / "task-model"
    if output.is_dir():
        return output
    recipe = Recipe(
        BackboneConfig(max_length=64),
        budget.data(),
        MethodConfig("siso", 1, 0, {"tune_backbone": True}),
        OptimConfig(epochs=4, batch_size=32, learning_rate=1e-4),
        LossConfig(infonce_weight=0.0),
        shuffles=1,
    )
    prepared = prepare(recipe, task)
    print(f"task model: accuracy {train_here(prepared).accuracy_mean:.1%}", flush=True)
    partial = folder / ".task-model"
    prepared.pretrained.backbone.model.save_pretrained(partial)
    prepared.pretrained.tokenizer.save_pretrained(partial)
    partial.rename(output)
    return output


def recipe_of(run: Run, budget: Budget, model: Path, folder: Path) -> Recipe:
    """A run as a recipe: the paper's loss, the same epochs and batches for all."""
    backbone = BackboneConfig(str(model), max_length=64)
    if run.system.method == "exit-head":
        method = MethodConfig("exit-head", 1, run.system.options["layer"], run.system.options)
        optim = OptimConfig(3 * budget.epochs, budget.batch_size, seed=run.seed, learning_rate=1e-3)
    else:
        method = run.system.config(run.num_inputs, load_pretrained(backbone).backbone.num_layers)
        optim = OptimConfig(budget.epochs, budget.batch_size, run.system.learning_rate, seed=run.seed)
    store = StoreConfig(root=str(folder / "features"))
    return Recipe(backbone, budget.data(), method, optim, LossConfig(), store, budget.shuffles)


def train_one(run: Run, budget: Budget, task: TaskData, model: Path, folder: Path) -> dict[str, Any]:
    """Train and test one system; its figures are kept in a file, so that a stopped benchmark goes on."""
    torch.set_num_threads(budget.threads)
    recipe = recipe_of(run, budget, model, folder)
    prepared = prepare(recipe, task)
    evaluation = train_here(prepared)
    trained = [value for value in prepared.model.parameters() if value.requires_grad]
    figures = evaluation.metrics() | {
        "accuracies": evaluation.accuracies,
        "cost_counted": prepared.cost(),
        "tunable_params": sum(value.numel() for value in trained),
        "prefill_layers": recipe.method.prefill_layers,
    }
    write_json(folder / "runs" / f"{run.name}.json", figures)
    return figures


def all_runs(budget: Budget, num_layers: int) -> list[Run]:
    """Every system at every N with every seed; the first seed of all comes first."""
    systems = [*SYSTEMS, *(exit_head(layer) for layer in range(1, num_layers))]
    return [
        Run(system, num_inputs, seed)
        for seed in range(budget.seeds)
        for system in systems
        for num_inputs in system.widths
    ]


def measure(budget: Budget, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Train what has no result yet.

    Args:
        budget: see :class:`Budget`.
        folder: of the task model, the features and the runs' results.

    Returns:
        Rows, the identity of the data and of the task model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(budget.data())
    model = tuned_task_model(budget, task, folder)
    pretrained = load_pretrained(BackboneConfig(str(model), max_length=64))
    num_layers = pretrained.backbone.num_layers
    runs = all_runs(budget, num_layers)
    missing = [run for run in runs if not (folder / "runs" / f"{run.name}.json").is_file()]
    if missing:
        layers = list(range(1, num_layers))
        base = recipe_of(missing[0], budget, model, folder)
        for split in (task.train, task.selection, task.test):
            fill_store(base, split, layers)
        pool = ProcessPoolExecutor(budget.processes, get_context("spawn"))
        with pool:
            started = {pool.submit(train_one, run, budget, task, model, folder): run for run in missing}
            for done, future in enumerate(as_completed(started), 1):
                run = started[future]
                print(f"{done}/{len(missing)} {run.name}: {future.result()['accuracy_mean']:.1%}", flush=True)
    rows = list(_rows(runs, folder))
    siso = next(row["siso_accuracy"] for row in rows if row["siso_accuracy"] is not None)
    alone = {"title": "SISO", "method": "siso", "num_inputs": 1, "prefill_layers": 0, "tunable_params": 0, "seeds": 1}
    alone |= {"accuracy_mean": siso, "accuracy_std": 0.0, "siso_accuracy": siso, "siso_agreement": 1.0}
    return [alone | {"cost_counted": 1.0, "throughput_ratio": 1.0}, *rows], task.identity, pretrained.identity


def _rows(runs: list[Run], folder: Path) -> Iterator[dict[str, Any]]:
    together: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        together.setdefault((run.system.title, run.num_inputs), []).append(run)
    for (title, num_inputs), same in together.items():
        results = [json.loads((folder / "runs" / f"{run.name}.json").read_text()) for run in same]
        means = [result["accuracy_mean"] for result in results]
        agreed = [
            result["siso_agreement"] for result in results if result["siso_agreement"] == result["siso_agreement"]
        ]
        teachers = [result["siso_accuracy"] for result in results if result["siso_accuracy"] == result["siso_accuracy"]]
        yield {
            "title": title,
            "method": same[0].system.method,
            "num_inputs": num_inputs,
            "prefill_layers": results[0]["prefill_layers"],
            "tunable_params": results[0]["tunable_params"],
            "seeds": len(results),
            "accuracy_mean": statistics.fmean(means),
            "accuracy_std": statistics.stdev(means) if len(means) > 1 else 0.0,
            "accuracy_seeds": means,
            "siso_accuracy": teachers[0] if teachers else None,
            "siso_agreement": statistics.fmean(agreed) if agreed else None,
            "cost_counted": results[0]["cost_counted"],
        }
