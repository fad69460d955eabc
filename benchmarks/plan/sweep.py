"""A sweep against its own trials run one after another, without the feature store and with it.

The sweep is the command that a user runs, timed from start to end: interpreter, Ray cluster, MLflow, the pass that
fills an empty store, and one concurrent trial per core. It runs once with early stopping of trials that cannot reach the
front, and once without. The other sides run the same recipes completely (load, train to the end, evaluate on the same
splits) in one process that has already imported its libraries and uses all cores. Without the store, one pass per batch
computes teacher and prefill.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import ratio_row
from benchmarks.trained import fill_store
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.run import prepare_sweep
from revmux.data.task import TaskData
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.training.config import Recipe
from revmux.training.evaluation import Evaluation
from revmux.training.recipe import Prepared, load_backbone, prepare, train_here


def train_online(recipe: Recipe, task: TaskData) -> Evaluation:
    """Train without a store: for every batch, the frozen layers run once to compute teacher and prefill."""
    torch.manual_seed(recipe.optim.seed)
    pretrained = load_backbone(recipe, task.label_names)
    backbone, method = pretrained.backbone.freeze(), recipe.method
    built = build_method(method.name, BackboneShape.of(backbone), method.num_inputs, method.options)
    model = MultiplexedClassifier(backbone, built, method.prefill_layers)
    train, selection, test = (
        OnlineFeatures(
            pretrained.tokenize(split, recipe.backbone.max_length), backbone, prefill_layers=method.prefill_layers
        )
        for split in (task.train, task.selection, task.test)
    )
    return train_here(Prepared(recipe, pretrained, task, model, train, selection, test))


def one_after_another(job: TuneJob, folder: Path, online: bool) -> dict[str, int]:
    """Run every trial of the sweep in this process; return the number of trials by status."""
    sweep = prepare_sweep(job, str(folder))
    recipes = [replace(trial.recipe, store=StoreConfig(root=str(folder / "features"))) for trial in sweep.trials]
    if not online:
        layers = sorted({recipe.method.prefill_layers for recipe in recipes})
        for split in (sweep.task.train, sweep.task.selection, sweep.task.test):
            fill_store(recipes[0], split, layers)
    for recipe in recipes:
        if online:
            train_online(recipe, sweep.task)
        else:
            train_here(prepare(recipe, sweep.task))
    return {"done": len(recipes)}


def sweep_command(job: TuneJob, folder: Path, stopping: bool) -> dict[str, int]:
    """Run the same sweep as a command, in its own processes; return the number of trials by status.

    Raises:
        RuntimeError: the command or a trial failed.
    """
    flags = {
        "backbone.model": job.backbone.model,
        "backbone.max_length": job.backbone.max_length,
        "data.source": job.data.source,
        "data.per_class": job.data.per_class,
        "space": job.space,
        "storage": folder,
        "store.root": folder / "features",
        "stopping.enabled": str(stopping).lower(),
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.tune", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the sweep ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    rows = json.loads((folder / "sweeps" / job.name / "sweep.json").read_text())
    if failed := [row["trial"] for row in rows if row["status"] == "failed"]:
        raise RuntimeError(f"trials {', '.join(failed)} failed, so the sides did not do the same work")
    return dict(Counter(row["status"] for row in rows))


SIDES: dict[str, Callable[[TuneJob, Path], dict[str, int]]] = {
    "sweep": partial(sweep_command, stopping=True),
    "whole": partial(sweep_command, stopping=False),
    "online": partial(one_after_another, online=True),
    "stored": partial(one_after_another, online=False),
}


def one_round(job: TuneJob) -> dict[str, dict[str, Any]]:
    """Run each side in turn; return its ``seconds`` and its number of ``trials`` by status.

    Raises:
        RuntimeError: the sides did not run the same trials.
    """
    found: dict[str, dict[str, Any]] = {}
    for side, run in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            trials = run(job, Path(folder))
            found[side] = {"seconds": time.perf_counter() - started, "trials": trials}
        print(f"{side}: {found[side]['seconds']:.0f} s, {trials}", flush=True)
    if len({sum(one["trials"].values()) for one in found.values()}) > 1:
        raise RuntimeError(f"the sides ran different numbers of trials: {found}")
    return found


def rows_of(rounds: Sequence[dict[str, dict[str, Any]]], space: str) -> list[dict[str, Any]]:
    """Return the rows from the rounds of one run."""
    about = {
        "space": space,
        "trials": sum(rounds[0]["online"]["trials"].values()),
        "seconds": {side: round(statistics.median(one[side]["seconds"] for one in rounds), 1) for side in SIDES},
    }
    names = {
        "sweep": ("the sweep", 3.0),
        "whole": ("the sweep with every trial to its end", None),
        "stored": ("one after another with it", None),
    }
    return [
        about
        | {"stopped": [one[side]["trials"].get("stopped", 0) for one in rounds]}
        | ratio_row(
            f"trials of '{space}' one after another without the store / {name}",
            [one["online"]["seconds"] / one[side]["seconds"] for one in rounds],
            target,
        )
        for side, (name, target) in names.items()
    ]
