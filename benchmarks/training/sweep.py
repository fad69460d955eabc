"""The first trial of a sweep, which fills the feature store, against the second, which reads it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rows import ratio_row
from benchmarks.training.backbones import MAX_LENGTH, embedded, small_task
from revmux.data.config import DataConfig
from revmux.data.task import TaskData
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.task_model import save_task_model
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import prepare, train_here

PER_CLASS, PAIRS = 150, 2
TRIALS = ((1, 2), (1, 4), (3, 2))  # epochs and N
SETTINGS = (PER_CLASS, PAIRS, TRIALS)


def trial(recipe: Recipe, task: TaskData) -> float:
    """Return the seconds of one trial: prepare, train, evaluate; the data is already loaded, as in a sweep."""
    started = time.perf_counter()
    train_here(prepare(recipe, task))
    return time.perf_counter() - started


def measure() -> list[dict[str, Any]]:
    """Return rows for trials of one epoch, as early stopping in a sweep leaves many, and of three."""
    rows = []
    task = small_task(PER_CLASS)
    with tempfile.TemporaryDirectory() as folder:
        model = save_task_model(embedded(task), Path(folder) / "task-model")
        for epochs, num_inputs in TRIALS:
            ratios = []
            for pair in range(PAIRS + 1):  # the first pair is a warm-up
                recipe = Recipe(
                    BackboneConfig(str(model), max_length=MAX_LENGTH),
                    DataConfig("docstrings", per_class=PER_CLASS),
                    MethodConfig("revmux", num_inputs, 3),
                    OptimConfig(epochs, 16, seed=pair),
                    LossConfig(infonce_weight=0.25),
                    StoreConfig(root=f"{folder}/features-{epochs}-{num_inputs}-{pair}"),
                    shuffles=1,
                )
                first = trial(recipe, task)
                ratios.append(first / trial(replace(recipe, loss=LossConfig(infonce_weight=0.5)), task))
            name = f"first trial of a sweep / second, {epochs} epoch{'s' if epochs > 1 else ''}"
            rows.append(
                {"backbone": "all-MiniLM-L6-v2", "num_inputs": num_inputs, "prefill_layers": 3}
                | ratio_row(name, ratios[1:], 3.0)
            )
            print(f"{name}, N = {num_inputs}: {rows[-1]['ratio_median']}", flush=True)
    return rows
