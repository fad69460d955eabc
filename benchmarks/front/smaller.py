"""The ladder of a plan on weights of each type: what a ladder and smaller weights save together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from benchmarks.comparison.systems import Ready
from benchmarks.front.models import accuracy, quantized
from benchmarks.front.plans import MEASURE, plan_folder
from revmux.adapters.config import MERGE_LIMIT
from revmux.backbone import Backbone
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.ladder import Ladder, Stage
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.adapters import LoadedAdapter, load_adapters

ALLOWANCE = 0.5
"""The plan whose ladder is measured, in points."""


def smaller_ladder_rows(ready: Ready, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per type of weights, on the test split and in pairs with SISO in float32; none if the plan has no ladder.

    Args:
        ready: the task.
        plan: the row of the plan over all systems for :data:`ALLOWANCE`, which has been made.
    """
    if len(plan["stages"]) < 2:
        return []
    home = plan_folder(ready, plan["systems"], plan["allowance"]) / "adapters"
    folders = [home / f"stage{number}-n{stage['num_inputs']}" for number, stage in enumerate(plan["stages"], 1)]
    pretrained = load_pretrained(ready.backbone)
    plain = plain_classifier(pretrained.backbone.freeze())
    adapters = load_adapters(folders, pretrained)
    assert [one.threshold for one in adapters] == [stage["threshold"] or 0.0 for stage in plan["stages"]]
    split = pretrained.tokenize(ready.task.test, ready.backbone.max_length)
    timed = like_length_batches(split, MEASURE.throughput_inputs, MEASURE.throughput_batch)
    siso = accuracy(plain, split)
    rows = []
    for name, ladder in _ladders(pretrained, adapters, ready):
        ratio = paired_throughput(plain, ladder, timed, MEASURE.throughput_pairs)
        rows.append(
            {
                "table": "front",
                "title": f"{name} weights and the ladder planned for {plan['allowance']:g} points",
                "method": "rival",
                "recipe": None,
                "weights": name,
                "stages": plan["stages"],
                "lora_rank": max(stage["options"].get("lora_rank") or 0 for stage in plan["stages"]),
                "num_inputs": ladder.num_inputs,
                "prefill_layers": ladder.stages[0].model.prefill_layers,
                "exit_layer": None,
                "fallback": sum(int(ladder.classify(tokens).fell_back.sum()) for tokens in timed)
                / sum(len(tokens["input_ids"]) for tokens in timed),
                "tunable_params": 0,
                "seeds": 1,
                "accuracy_mean": accuracy(ladder, split),
                "accuracy_std": None,
                "siso_accuracy": siso,
                "cost_counted": None,
                "throughput_ratio": ratio.median,
                "throughput_pairs": asdict(ratio),
            }
        )
    return rows


def _ladders(pretrained: Pretrained, adapters: list[LoadedAdapter], ready: Ready) -> Iterator[tuple[str, Ladder]]:
    """The ladder on each type of weights. The adapters' own weights stay in float32.

    LoRA cannot update int8 layers, so a ladder with LoRA is left out there.
    """
    half = load_pretrained(replace(ready.backbone, dtype="bfloat16")).backbone.freeze()
    backbones = {"float32": pretrained.backbone, "bfloat16": half}
    if not any(one.model.method.lora for one in adapters):
        backbones["int8"] = quantized(pretrained.backbone)
    for name, backbone in backbones.items():
        yield name, Ladder([_on(backbone, one) for one in adapters])


def _on(backbone: Backbone, adapter: LoadedAdapter) -> Stage:
    """The stage on another backbone, with LoRA merged as in a server."""
    model = MultiplexedClassifier(backbone, adapter.model.method, adapter.model.prefill_layers)
    model.merge_lora(MERGE_LIMIT)
    return replace(adapter.stage, model=model)
