"""Train one adapter and measure it on the test split. Both are kept, so an interrupted benchmark resumes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.front.tasks import Ready
from benchmarks.trained import Run, fill_store
from revmux.adapters.folder import load_adapter
from revmux.features.store import open_features
from revmux.plan.build import train_recipes, unrounded
from revmux.training.evaluation import evaluate_both
from revmux.training.recipe import load_backbone, relative_cost_at
from revmux.utils.files import write_json
from revmux.utils.run_info import git_commit


def fill_stores(ready: Ready, found: list[Run]) -> None:
    """Store the states of every layer that a missing run reads, in one pass per split."""
    layers = sorted({run.recipe.method.prefill_layers for run in found if not run.is_done})
    if layers:
        for split in (ready.choosing.train, ready.choosing.selection, ready.choosing.test):
            fill_store(found[0].recipe, split, layers)


def measure_run(run: Run, ready: Ready, threads: int) -> dict[str, Any]:
    """Train the adapter of a run unless its folder exists, evaluate it on the test split, and write its figures."""
    torch.set_num_threads(threads)
    recipe = run.recipe
    adapter = train_recipes([recipe], ready.choosing, ready.folder / "adapters")[0]
    pretrained = load_backbone(recipe, ready.task.label_names)
    pretrained.backbone.freeze()
    model = load_adapter(adapter.folder, pretrained)
    split = pretrained.tokenize(ready.task.test, recipe.backbone.max_length)
    layer = recipe.method.prefill_layers
    features = open_features(pretrained, split, [layer], unrounded(recipe.store)).at(layer)
    found = evaluate_both(model, features, shuffles=recipe.shuffles, seed=recipe.optim.seed)
    figures = found.metrics() | {
        "accuracies": found.accuracies,
        "cost_counted": relative_cost_at(model, features),
        "adapter": adapter.folder,
        "asked": run.asked,
        "commit": git_commit(),
    }
    write_json(run.result, figures)
    return figures
