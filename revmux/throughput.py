"""Inputs a second against SISO: the model alone, measured in pairs, since a machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from revmux.backbone.base import evaluating
from revmux.data import TokenizedSplit
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class Ratio:
    """Throughput relative to the baseline over the pairs of one run.

    Attributes:
        median: of the pairs; above 1 is faster than the baseline.
        least: smallest pair.
        most: largest pair.
        pairs: how many.
    """

    median: float
    least: float
    most: float
    pairs: int


@torch.no_grad()
def paired_throughput(
    baseline: MultiplexedClassifier,
    rivals: Mapping[str, MultiplexedClassifier],
    split: TokenizedSplit,
    inputs: int = 256,
    batch_size: int = 64,
    pairs: int = 5,
) -> dict[str, Ratio]:
    """Time baseline and rival in turn, A B A B, on the same batches of like length.

    Args:
        baseline: usually SISO.
        rivals: by name.
        split: where the inputs come from.
        inputs: how many are classified in one timing.
        batch_size: inputs a forward pass.
        pairs: timings of each; one more of each comes first and does not count.
    """
    rows = torch.linspace(0, len(split) - 1, min(inputs, len(split))).long()
    rows = rows[split.lengths[rows].argsort()]
    batches = [split.batch(chunk, baseline.backbone.device) for chunk in rows.split(batch_size)]

    def seconds(model: MultiplexedClassifier) -> float:
        _wait(model)
        started = time.perf_counter()
        for tokens in batches:
            model(tokens)
        _wait(model)
        return time.perf_counter() - started

    ratios: dict[str, Ratio] = {}
    for name, rival in rivals.items():
        with evaluating(baseline), evaluating(rival):
            measured = [seconds(baseline) / seconds(rival) for _ in range(pairs + 1)][1:]
        ratios[name] = Ratio(statistics.median(measured), min(measured), max(measured), pairs)
    return ratios


def _wait(model: MultiplexedClassifier) -> None:
    if model.backbone.device.type == "cuda":
        torch.cuda.synchronize()
