"""Rivals that are not adapters: fewer layers, a distilled student, fewer tokens, and smaller weights, also with RevMUX."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from benchmarks.comparison.systems import Ready
from benchmarks.front.models import PRUNED_SHARE, PrunedTokens, WithoutUpperLayers, accuracy, quantized
from benchmarks.front.student import distilled_student
from benchmarks.trained import Run
from revmux.adapters.folder import load_adapter
from revmux.backbone import Backbone
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.plan.config import MeasureConfig
from revmux.pretrained.loading import load_pretrained


def rival_rows(ready: Ready, mixed: Run | None, epochs: int, measuring: MeasureConfig) -> list[dict[str, Any]]:
    """The rows of all rivals on the test split, timed in pairs with SISO.

    Args:
        ready: the task.
        mixed: a trained run of RevMUX without LoRA, to combine with smaller weights; None leaves the combinations out.
        epochs: epochs of the students.
        measuring: how throughput is measured.
    """
    pretrained = load_pretrained(ready.backbone)
    plain = plain_classifier(pretrained.backbone.freeze())
    split = pretrained.tokenize(ready.task.test, ready.backbone.max_length)
    timed = like_length_batches(split, measuring.throughput_inputs, measuring.throughput_batch)
    siso = accuracy(plain, split)
    rows = []
    for title, model, cost, extra in _rivals(pretrained.backbone, mixed, ready, epochs):
        model.eval()
        ratio = paired_throughput(plain, model, timed, measuring.throughput_pairs)  # type: ignore[arg-type]
        rows.append(
            {
                "table": "front",
                "title": title,
                "method": "rival",
                "recipe": None,
                "lora_rank": 0,
                "num_inputs": 1,
                "prefill_layers": 0,
                "exit_layer": None,
                "fallback": 0,
                "tunable_params": 0,
                "seeds": 1,
                "accuracy_mean": accuracy(model, split),
                "accuracy_std": None,
                "siso_accuracy": siso,
                "cost_counted": cost,
                "throughput_ratio": ratio.median,
                "throughput_pairs": asdict(ratio),
            }
            | extra
        )
        print(f"{ready.name}, {title}: {rows[-1]['accuracy_mean']:.1%}", flush=True)
    return rows


def _rivals(
    backbone: Backbone, mixed: Run | None, ready: Ready, epochs: int
) -> Iterator[tuple[str, nn.Module, float | None, dict[str, Any]]]:
    depth = backbone.num_layers
    for layer in (depth // 2, depth - 2, depth - 1):
        yield f"Upper layers left out, {layer} of {depth} kept", WithoutUpperLayers(backbone, layer), layer / depth, {}
    for layer in (depth // 3, depth // 2):
        student = distilled_student(ready, layer, epochs)
        trained = {
            "tunable_params": sum(weight.numel() for weight in student.parameters() if weight.requires_grad),
            "epochs": epochs,
        }
        yield f"Distilled student, {layer} of {depth} layers", student, layer / depth, trained
    for layer in (1, depth // 2):
        share = (layer + PRUNED_SHARE * (depth - layer)) / depth
        yield f"Tokens pruned by attention after layer {layer}, half kept", PrunedTokens(backbone, layer), share, {}
    half = load_pretrained(replace(ready.backbone, dtype="bfloat16")).backbone.freeze()
    for name, small in (("int8", quantized(backbone)), ("bfloat16", half)):
        yield f"{name} weights", plain_classifier(small), None, {"weights": name}
        if mixed is not None:
            both = _with_adapter(small, mixed, ready)
            widths = {"num_inputs": both.num_inputs, "prefill_layers": both.prefill_layers}
            yield f"{name} weights and {mixed.title}", both, None, {"weights": name} | widths


def _with_adapter(small: Backbone, mixed: Run, ready: Ready) -> MultiplexedClassifier:
    """The adapter of a run on a backbone with smaller weights; its own weights stay in float32."""
    adapter = load_adapter(json.loads(mixed.result.read_text())["adapter"], load_pretrained(ready.backbone))
    return MultiplexedClassifier(small, adapter.method, adapter.prefill_layers)
