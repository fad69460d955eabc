"""The model alone: measured speed-up of groups against the plain model, over the counted one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.rows import ratio_row, unmeasured_row
from benchmarks.serving.places import LENGTH, Place, counted_speedup, random_revmux
from benchmarks.serving.settings import CUTS, WIDTHS, Row
from revmux.backbone import Backbone, TokenBatch, Verbalizer, cut
from revmux.backbone.generative import language_model_class
from revmux.estimate.shapes import GENERATIVE_TYPES, config_of
from revmux.estimate.throughput import paired_throughput
from revmux.model import MultiplexedClassifier

TARGET = 0.95
BATCH = 32
GPU_SHAPES = {"bert-base": 256, "llama-3-8b": 32}
"""Shapes that are timed on a GPU, and the inputs of a batch."""


def measure(place: Place, pairs: int) -> list[Row]:
    """A row for each N and l, on the CPU with all its cores."""
    batches = place.batches(place.sizes.alone, BATCH)
    target = TARGET if place.has_targets else None
    return list(compare(place.name, place.pretrained.backbone, batches, place.mean_length, pairs, target))


def measure_gpu(pairs: int) -> list[Row]:
    """The same in bfloat16 for large shapes with random weights; rows without figures where there is no GPU."""
    if not torch.cuda.is_available():
        why = "no GPU on the machine that wrote this file"
        return [unmeasured_row(_name(f"{shape} in bf16 on a GPU"), why) for shape in GPU_SHAPES]
    rows: list[Row] = []
    for shape, batch_size in GPU_SHAPES.items():
        backbone = random_backbone(shape, torch.device("cuda"), torch.bfloat16)
        rows += compare(f"{shape} in bf16 on a GPU", backbone, [random_tokens(backbone, batch_size)], LENGTH, pairs)
    return rows


def _name(backbone: str) -> str:
    return f"model alone, {backbone}: measured / counted speed-up"


def random_backbone(model: str, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A shape with random weights; a language model answers by two label words.

    Args:
        model: a preset of :mod:`revmux.estimate.shapes`, or a model folder.
        device: where its weights are made.
        dtype: their type.
    """
    config = config_of(model)
    torch.manual_seed(0)
    with device:
        if config.model_type in GENERATIVE_TYPES:
            speaks = language_model_class(config).from_config(config, dtype=dtype)
            return cut(speaks, Verbalizer(("no", "yes"), ((1,), (2,)))).freeze()
        return cut(AutoModelForSequenceClassification.from_config(config, dtype=dtype)).freeze()


def random_tokens(backbone: Backbone, inputs: int) -> TokenBatch:
    """Inputs of 128 tokens, each (B, S)."""
    tokens = torch.randint(3, backbone.config.vocab_size, (inputs, LENGTH), device=backbone.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def compare(
    name: str,
    backbone: Backbone,
    batches: Sequence[TokenBatch],
    length: int,
    pairs: int,
    target: float | None = None,
) -> Iterator[Row]:
    """A row for each N and l.

    Args:
        name: of the backbone, in the rows.
        backbone: frozen.
        batches: what is classified in one timing; each (B, S).
        length: tokens of an input, by which the cost is counted.
        pairs: timings of each.
        target: of measured over counted.
    """
    inputs = sum(len(tokens["input_ids"]) for tokens in batches)
    siso = random_revmux(backbone, 1, 0)
    plain_seconds = _seconds(siso, batches)
    for layer in CUTS:
        for num_inputs in WIDTHS:
            rival = random_revmux(backbone, num_inputs, layer)
            counted = counted_speedup(rival, length)
            ratio = paired_throughput(siso, rival, batches, pairs)
            of_counted = [value / counted for value in (ratio.least, ratio.median, ratio.most)]
            row = ratio_row(_name(f"{name}, N = {num_inputs}, l = {layer}"), of_counted, target)
            yield row | {
                "pairs": ratio.pairs,
                "backbone": name,
                "num_inputs": num_inputs,
                "prefill_layers": layer,
                "cost_counted": round(1 / counted, 4),
                "throughput_ratio": round(ratio.median, 3),
                "plain_per_second": round(inputs / plain_seconds, 3),
                "inputs": inputs,
                "tokens": length,
            }


@torch.no_grad()
def _seconds(model: MultiplexedClassifier, batches: Sequence[TokenBatch]) -> float:
    """Of one timing, after a first one that does not count; reading the scores waits for a GPU."""
    for _ in range(2):
        started = time.perf_counter()
        for tokens in batches:
            model(tokens).cpu()
    return time.perf_counter() - started
