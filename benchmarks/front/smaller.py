"""The ladder of a plan on smaller weights: what both savings are worth together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from benchmarks.comparison.systems import Ready
from benchmarks.front.models import accuracy, quantized
from benchmarks.front.plans import MEASURE, plan_folder
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.ladder import Ladder, Stage
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.adapters import LoadedAdapter, load_adapters

ALLOWANCE = 0.5
"""The plan whose ladder is measured, in points."""


def smaller_ladder_rows(ready: Ready) -> list[dict[str, Any]]:
    """One row per type of weights, on the test split and in pairs with SISO in float32; none if the plan has no ladder.

    Args:
        ready: the task, whose plans have been made.
    """
    folders = sorted((plan_folder(ready, "all systems", ALLOWANCE) / "adapters").glob("stage*"))
    pretrained = load_pretrained(ready.backbone)
    plain = plain_classifier(pretrained.backbone.freeze())
    split = pretrained.tokenize(ready.task.test, ready.backbone.max_length)
    timed = like_length_batches(split, MEASURE.throughput_inputs, MEASURE.throughput_batch)
    rows = []
    for name, ladder in _ladders(pretrained, load_adapters(folders, pretrained), ready) if folders else ():
        ratio = paired_throughput(plain, ladder, timed, MEASURE.throughput_pairs)
        rows.append(
            {
                "table": "front",
                "title": f"{name} weights and the ladder planned for {ALLOWANCE:g} points",
                "method": "rival",
                "recipe": None,
                "weights": name,
                "stages": [stage.model.method.name for stage in ladder.stages],
                "lora_rank": 0,
                "num_inputs": ladder.num_inputs,
                "prefill_layers": ladder.stages[0].model.prefill_layers,
                "exit_layer": None,
                "fallback": 0,
                "tunable_params": 0,
                "seeds": 1,
                "accuracy_mean": accuracy(ladder, split),
                "accuracy_std": None,
                "siso_accuracy": accuracy(plain, split),
                "cost_counted": None,
                "throughput_ratio": ratio.median,
                "throughput_pairs": asdict(ratio),
            }
        )
    return rows


def _ladders(pretrained: Pretrained, adapters: list[LoadedAdapter], ready: Ready) -> Iterator[tuple[str, Ladder]]:
    """The ladder on each type of weights. LoRA has no int8 layers to update."""
    half = load_pretrained(replace(ready.backbone, dtype="bfloat16")).backbone.freeze()
    backbones = {"bfloat16": half}
    if not any(adapter.model.method.lora for adapter in adapters):
        backbones["int8"] = quantized(pretrained.backbone)
    for name, small in backbones.items():
        models = (MultiplexedClassifier(small, one.model.method, one.model.prefill_layers) for one in adapters)
        yield name, Ladder([Stage(model, one.threshold, one.stage.deferral) for model, one in zip(models, adapters)])
