"""Tasks that are PEFT adapters on one base, each with its own RevMUX adapters. All weights are random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serving.settings import WIDTHS, Shape
from benchmarks.serving.workloads import random_revmux, write_shape
from benchmarks.tasks.adapters import write_adapters
from benchmarks.tasks.settings import Settings
from revmux.adapters.folder import describe_adapter, save_adapter
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.identity import identity_of
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.shared_base import SharedBases

RANK = 8


def write_tasks(folder: Path, shape: Shape, cut: int, tokens: int, count: int) -> dict[str, dict[str, Any]]:
    """Write tasks, and return their settings for the server by name.

    Args:
        folder: an empty folder.
        shape: shape of the base.
        cut: number of the base's layers that no task changes; the inputs of a group are mixed above them.
        tokens: tokens per input.
        count: number of tasks.
    """
    base = write_shape(folder / "base", shape)
    peft = write_adapters(Settings(base=str(base), rank=RANK, frozen_layers=cut), folder, count)
    first = load_pretrained(BackboneConfig(str(peft[0]), max_length=tokens), bases=SharedBases())
    models = [random_revmux(first.backbone, width, cut) for width in WIDTHS]
    described = [describe_adapter(model, first, tokens, {"source": "random"}) for model in models]
    tasks = {}
    for task in peft:
        identity = identity_of(BackboneConfig(str(task), max_length=tokens))
        adapters = [
            save_adapter(model, replace(config, base_model=identity), folder / f"{task.name}-n{config.num_inputs}")
            for model, config in zip(models, described)
        ]
        tasks[f"task-{task.name}"] = {"model": str(task), "adapters": [str(adapter) for adapter in adapters]}
    return tasks
