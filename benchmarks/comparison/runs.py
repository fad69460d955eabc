"""Train adapters and measure them on the test split. Both are kept, so an interrupted benchmark resumes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.comparison.systems import Ready, System
from benchmarks.trained import Run, fill_store
from revmux.adapters.config import load_adapter_config
from revmux.adapters.folder import load_adapter
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.features.store import open_features
from revmux.model import plain_classifier
from revmux.plan.build import train_recipes, unrounded
from revmux.plan.config import MeasureConfig
from revmux.training.evaluation import evaluate_both
from revmux.training.recipe import load_backbone, relative_cost_at
from revmux.utils.files import write_json
from revmux.utils.run_info import git_commit

Measure = Callable[[Run, Ready, int], dict[str, Any]]
"""Trains and measures one run of a task with some threads, and writes and returns its figures."""


def fill_stores(ready: Ready, found: Sequence[Run]) -> None:
    """Store the states of every layer that a missing run reads, in one pass per split."""
    layers = sorted({run.recipe.method.prefill_layers for run in found if not run.is_done})
    if layers:
        for split in (ready.choosing.train, ready.choosing.selection, ready.choosing.test):
            fill_store(found[0].recipe, split, layers)


def measure_run(
    run: Run, ready: Ready, threads: int, timing: MeasureConfig | None = None, shuffles: int | None = None
) -> dict[str, Any]:
    """Train the adapter of a run unless its folder exists, evaluate it on the test split, and write its figures.

    Args:
        run: the run.
        ready: its task.
        threads: threads of PyTorch.
        timing: how throughput is measured; None leaves it out.
        shuffles: groupings of the test split; None takes those of the recipe.
    """
    torch.set_num_threads(threads)
    started, recipe = time.perf_counter(), run.recipe
    adapter = train_recipes([recipe], ready.choosing, ready.folder / "adapters")[0]
    trained = time.perf_counter()
    pretrained = load_backbone(recipe, ready.task.label_names)
    pretrained.backbone.freeze()
    model = load_adapter(adapter.folder, pretrained)
    split = pretrained.tokenize(ready.task.test, recipe.backbone.max_length)
    layer = recipe.method.prefill_layers
    features = open_features(pretrained, split, [layer], unrounded(recipe.store)).at(layer)
    found = evaluate_both(
        model, features, shuffles=recipe.shuffles if shuffles is None else shuffles, seed=recipe.optim.seed
    )
    figures = found.metrics() | {
        "accuracies": found.accuracies,
        "cost_counted": relative_cost_at(model, features),
        "adapter": adapter.folder,
        "asked": run.asked,
        "commit": git_commit(),
        "seconds": {
            "train": round(trained - started, 1),
            "evaluate": round(time.perf_counter() - trained, 1),
        },
    }
    if timing is not None:
        batches = like_length_batches(split, timing.throughput_inputs, timing.throughput_batch)
        ratio = paired_throughput(plain_classifier(pretrained.backbone), model, batches, timing.throughput_pairs)
        figures |= {"throughput_ratio": ratio.median, "throughput_pairs": asdict(ratio)}
    write_json(run.result, figures)
    return figures


def train_missing(
    chosen: Sequence[Run], ready: Ready, processes: int, threads: int = 1, measure: Measure = measure_run
) -> None:
    """Train and measure the runs that have no result yet, in the order given.

    Args:
        chosen: the runs.
        ready: their task.
        processes: runs at the same time.
        threads: threads per run.
        measure: trains and measures one run.
    """
    missing = [run for run in chosen if not run.is_done]
    for done, (run, figures) in enumerate(_measured(missing, ready, processes, threads, measure), 1):
        print(f"{ready.name} {done}/{len(missing)} {run.result.stem}: {figures['accuracy_mean']:.1%}", flush=True)


def _measured(
    runs: Sequence[Run], ready: Ready, processes: int, threads: int, measure: Measure
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with its figures as soon as it is done; one process is this one."""
    if processes == 1:
        yield from ((run, measure(run, ready, threads)) for run in runs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        started = {pool.submit(measure, run, ready, threads): run for run in runs}
        yield from ((started[future], future.result()) for future in as_completed(started))


def by_system(found: Sequence[tuple[System, Run]]) -> list[list[tuple[System, Run]]]:
    """The finished runs, those of one system and N together."""
    together: dict[tuple[str, int], list[tuple[System, Run]]] = {}
    for system, run in found:
        if run.is_done:
            together.setdefault((run.title, system.method.num_inputs), []).append((system, run))
    return list(together.values())


def row_over_seeds(same: Sequence[tuple[System, Run]]) -> dict[str, Any]:
    """The row of one system and N: means over the seeds and their spread, without throughput.

    Args:
        same: its finished runs.
    """
    system, run = same[0]
    results = [json.loads(one.result.read_text()) for _, one in same]
    means = [result["accuracy_mean"] for result in results]
    served = [result.get("accuracy_mean_served", result["accuracy_mean"]) for result in results]
    return {
        "title": system.title,
        "method": system.method.name,
        "recipe": system.recipe,
        "lora_rank": run.recipe.method.options.get("lora_rank", 0),
        "num_inputs": system.method.num_inputs,
        "prefill_layers": system.method.prefill_layers,
        "exit_layer": run.recipe.method.options.get("layer"),
        "fallback": 0,
        "epochs": run.recipe.optim.epochs,
        "tunable_params": _tunable(results[0]),
        "seeds": len(results),
        "accuracy_mean": statistics.fmean(means),
        "accuracy_std": statistics.stdev(means) if len(means) > 1 else None,
        "accuracy_seeds": means,
        "accuracy_served": statistics.fmean(served),
        "siso_accuracy": results[0]["siso_accuracy"],
        "siso_agreement": statistics.fmean(result["siso_agreement"] for result in results),
        "cost_counted": results[0]["cost_counted"],
        "commits": sorted({result["commit"] or "unknown" for result in results}),
    }


def _tunable(result: dict[str, Any]) -> int:
    """The trained weights of a run: what it recorded, or what its adapter did."""
    recorded: int | None = result.get("tunable_params")
    return load_adapter_config(result["adapter"]).tunable_parameters if recorded is None else recorded
