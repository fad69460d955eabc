"""The model without a server: measured speed-up of groups over the plain model, divided by the counted speed-up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.rows import ratio_row, unmeasured_row
from benchmarks.serving.settings import CUTS, WIDTHS, Row
from benchmarks.serving.workloads import LENGTH, Workload, counted_speedup, random_revmux
from revmux.backbone import Backbone, TokenBatch, Verbalizer, cut
from revmux.backbone.generative import language_model_class
from revmux.estimate.shapes import GENERATIVE_TYPES, config_of
from revmux.estimate.throughput import paired_throughput
from revmux.model import MultiplexedClassifier

TARGET = 0.95
BATCH = 32
GPU_SHAPES = {"bert-base": 256, "llama-3-8b": 32}
"""Shapes that are timed on a GPU, with the inputs per batch."""


def measure(workload: Workload, pairs: int) -> list[Row]:
    """Return a row for each N and l, measured on all cores of the CPU."""
    batches = workload.batches(workload.sizes.alone, BATCH)
    target = TARGET if workload.has_targets else None
    return list(compare(workload.name, workload.pretrained.backbone, batches, workload.mean_length, pairs, target))


def measure_gpu(pairs: int) -> list[Row]:
    """Return the same rows in bfloat16 for large shapes with random weights; without figures if there is no GPU."""
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
    """Return a backbone with random weights; a language model answers with two label words.

    Args:
        model: a preset of :mod:`revmux.estimate.shapes`, or a model folder.
        device: device on which the weights are created.
        dtype: type of the weights.
    """
    config = config_of(model)
    torch.manual_seed(0)
    with device:
        if config.model_type in GENERATIVE_TYPES:
            language_model = language_model_class(config).from_config(config, dtype=dtype)
            return cut(language_model, Verbalizer(("no", "yes"), ((1,), (2,)))).freeze()
        return cut(AutoModelForSequenceClassification.from_config(config, dtype=dtype)).freeze()


def random_tokens(backbone: Backbone, inputs: int, length: int = LENGTH) -> TokenBatch:
    """Return random inputs of the same length: each tensor is (B, S)."""
    tokens = torch.randint(3, backbone.config.vocab_size, (inputs, length), device=backbone.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def compare(
    name: str,
    backbone: Backbone,
    batches: Sequence[TokenBatch],
    length: int,
    pairs: int,
    target: float | None = None,
) -> Iterator[Row]:
    """Yield a row for each N and l.

    Args:
        name: name of the backbone in the rows.
        backbone: the frozen backbone.
        batches: inputs of one timing, each tensor (B, S).
        length: tokens per input, for the counted cost.
        pairs: number of paired timings.
        target: target of the measured speed-up divided by the counted one.
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
    """Return the seconds of one run after a warm-up run; copying the scores to the CPU waits for the GPU."""
    for _ in range(2):
        started = time.perf_counter()
        for tokens in batches:
            model(tokens).cpu()
    return time.perf_counter() - started
