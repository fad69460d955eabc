"""Inputs per second relative to SISO, for the model alone; timed in alternating pairs, since a machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from revmux.backbone import TokenBatch
from revmux.backbone.base import evaluating
from revmux.data.tokens import SplitTokens
from revmux.ladder import Ladder
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class Ratio:
    """Throughput relative to the baseline, over the pairs of one run.

    Attributes:
        median: median ratio of the pairs; above 1 is faster than the baseline.
        least: smallest ratio.
        most: largest ratio.
        pairs: number of pairs.
        baseline_rate: median inputs per second of the baseline.
    """

    median: float
    least: float
    most: float
    pairs: int
    baseline_rate: float


def like_length_batches(
    split: SplitTokens, inputs: int, batch_size: int, device: torch.device | str = "cpu"
) -> list[TokenBatch]:
    """Inputs spread evenly over a split, in batches of similar length.

    Args:
        split: the split to take inputs from.
        inputs: number of inputs; all of them if the split has fewer.
        batch_size: inputs per batch.
        device: device of the batches.
    """
    rows = torch.linspace(0, len(split) - 1, min(inputs, len(split))).long()
    rows = rows[split.lengths[rows].argsort()]
    return [split.batch(chunk, device) for chunk in rows.split(batch_size)]


@torch.no_grad()
def paired_throughput(
    baseline: MultiplexedClassifier,
    rival: MultiplexedClassifier | Ladder,
    batches: Sequence[TokenBatch],
    pairs: int = 5,
) -> Ratio:
    """Time baseline and rival in turn, A B A B, on the same batches.

    Args:
        baseline: the model to compare with, usually SISO.
        rival: the model or ladder that is compared. The time of a ladder depends on how many of these inputs go on.
        batches: the inputs that both classify in one timing; each (B, S).
        pairs: timings of each model; one more pair runs first as a warm-up.
    """

    def seconds(model: MultiplexedClassifier | Ladder) -> float:
        _synchronize(model)
        started = time.perf_counter()
        for tokens in batches:
            model(tokens)
        _synchronize(model)
        return time.perf_counter() - started

    with evaluating(baseline), evaluating(rival):
        timed = [(seconds(baseline), seconds(rival)) for _ in range(pairs + 1)][1:]
    ratios = [first / second for first, second in timed]
    rate = sum(len(tokens["input_ids"]) for tokens in batches) / statistics.median(first for first, _ in timed)
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), pairs, rate)


def _synchronize(model: MultiplexedClassifier | Ladder) -> None:
    if model.backbone.device.type == "cuda":
        torch.cuda.synchronize()
