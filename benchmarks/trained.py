"""Train many recipes on one machine, several at once. Results are kept in files, so an interrupted benchmark resumes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.rows import digest
from revmux.data.config import DataConfig
from revmux.data.task import TaskData
from revmux.features.store import open_features
from revmux.methods import Siso
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.identity import weights_sha256
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.location import locate
from revmux.pretrained.task_model import save_task_model
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import prepare, train_here
from revmux.utils.files import atomic_folder, write_json
from revmux.utils.run_info import git_commit


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        title: name of the system; runs with the same title and N differ only in their seed.
        recipe: the settings of the run.
        result: JSON file with the figures.
        asked: digest of everything but the code that determines the figures: recipe, data and task model.
    """

    title: str
    recipe: Recipe
    result: Path
    asked: str

    @classmethod
    def named(cls, title: str, recipe: Recipe, task: TaskData, folder: Path) -> Run:
        """Return a run whose file is named after its title, N and seed."""
        words = f"{title} N={recipe.method.num_inputs} seed={recipe.optim.seed}"
        name = "".join(letter if letter.isalnum() or letter == "=" else "-" for letter in words)
        asked = digest(recipe, task.identity["sha256"], weights_sha256(Path(locate(recipe.backbone.model))))
        return cls(title, recipe, folder / f"{name}.json", asked)

    @property
    def is_done(self) -> bool:
        """Whether the result file exists and was written for the current settings."""
        return self.result.is_file() and json.loads(self.result.read_text()).get("asked") == self.asked


def tuned_task_model(
    backbone: BackboneConfig, data: DataConfig, task: TaskData, optim: OptimConfig, frozen_layers: int, parent: Path
) -> Path:
    """Return the folder of the SISO model that all runs share; it is tuned once.

    Args:
        backbone: the pretrained encoder.
        data: settings of the task.
        task: the loaded data.
        optim: optimiser settings for tuning.
        frozen_layers: number of lowest layers that stay frozen.
        parent: folder in which the model is saved, under a name that depends on the settings.
    """
    method = MethodConfig(Siso.name, 1, frozen_layers, {"tune_backbone": True})
    recipe = Recipe(backbone, data, method, optim, LossConfig(infonce_weight=0.0), shuffles=1)
    output = parent / f"task-model-{digest(recipe, task.identity['sha256'])}"
    if output.is_dir():
        return output
    prepared = prepare(recipe, task)
    print(f"{output}: accuracy {train_here(prepared).accuracy_mean:.1%}", flush=True)
    with atomic_folder(output) as partial:
        save_task_model(prepared.pretrained, partial)
    return output


def train_one(run: Run, task: TaskData, threads: int) -> dict[str, Any]:
    """Train and evaluate one run, and write its figures."""
    torch.set_num_threads(threads)
    prepared = prepare(run.recipe, task)
    evaluation = train_here(prepared)
    trained = [value for value in prepared.model.parameters() if value.requires_grad]
    figures = evaluation.metrics() | {
        "accuracies": evaluation.accuracies,
        "cost_counted": prepared.cost(),
        "tunable_params": sum(value.numel() for value in trained),
        "prefill_layers": run.recipe.method.prefill_layers,
        "asked": run.asked,
        "commit": git_commit(),
    }
    write_json(run.result, figures)
    return figures


def train_missing(runs: Sequence[Run], task: TaskData, processes: int = 2, threads: int = 1) -> None:
    """Train the runs that have no result yet, several at once.

    Args:
        runs: the runs, in the order in which they start.
        task: the data of all runs.
        processes: number of runs at the same time.
        threads: threads per run.
    """
    missing = [run for run in runs if not run.is_done]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        started = {pool.submit(train_one, run, task, threads): run for run in missing}
        for done, future in enumerate(as_completed(started), 1):
            accuracy = future.result()["accuracy_mean"]
            print(f"{done}/{len(missing)} {started[future].result.stem}: {accuracy:.1%}", flush=True)


def over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row per title and N: means over the seeds, and their spread."""
    together: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        together.setdefault((run.title, run.recipe.method.num_inputs), []).append(run)
    rows = []
    for (title, num_inputs), same in together.items():
        results = [json.loads(run.result.read_text()) for run in same]
        means = [result["accuracy_mean"] for result in results]
        rows.append(
            {
                "title": title,
                "method": same[0].recipe.method.name,
                "num_inputs": num_inputs,
                "prefill_layers": results[0]["prefill_layers"],
                "fallback": 0,
                "tunable_params": results[0]["tunable_params"],
                "seeds": len(results),
                "accuracy_mean": statistics.fmean(means),
                "accuracy_std": statistics.stdev(means) if len(means) > 1 else 0.0,
                "accuracy_seeds": means,
                "siso_accuracy": results[0]["siso_accuracy"],
                "siso_agreement": statistics.fmean(result["siso_agreement"] for result in results),
                "cost_counted": results[0]["cost_counted"],
                "commits": sorted({result["commit"] for result in results}),
            }
        )
    return rows


def siso_row(accuracy: float) -> dict[str, Any]:
    """Return the row of the plain model, which is the teacher of every run."""
    return {
        "title": "SISO",
        "method": Siso.name,
        "num_inputs": 1,
        "prefill_layers": 0,
        "fallback": 0,
        "tunable_params": 0,
        "seeds": 1,
        "accuracy_mean": accuracy,
        "accuracy_std": None,
        "why": "one task model, on which all systems stand: the spread of the others does not contain it",
        "siso_accuracy": accuracy,
        "siso_agreement": 1.0,
        "cost_counted": 1.0,
        "throughput_ratio": 1.0,
    }


def fill_store(recipe: Recipe, split: Dataset, layers: Sequence[int], device: torch.device | str = "cpu") -> None:
    """Compute the stored features of a split in one pass for several runs: teacher and prefilled states at some layers.

    On a cluster :mod:`ray_jobs.features` does the same with many workers.

    Args:
        recipe: recipe of any of the runs; only its backbone and store are used.
        split: one split of their data.
        layers: prefill layers of the runs.
        device: device of the backbone.
    """
    pretrained = load_pretrained(recipe.backbone)
    pretrained.backbone.freeze().to(device)
    open_features(pretrained, pretrained.tokenize(split, recipe.backbone.max_length), layers, recipe.store)
