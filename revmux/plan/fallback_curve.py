"""Accuracy and cost of fallback at each threshold, over shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from revmux.backbone.base import evaluating
from revmux.errors import UserError
from revmux.estimate.flops import relative_cost, resume_cost
from revmux.fallback import check_threshold, confidence
from revmux.features.base import Features
from revmux.grouping import Grouping, evaluation_groups
from revmux.model import MultiplexedClassifier
from revmux.training.evaluation import predict


@dataclass(frozen=True)
class FallbackPoint:
    """The figures of one threshold.

    Attributes:
        threshold: confidence below which an answer falls back; 0 means no fallback.
        accuracy_mean: mean over shuffles, 0..1.
        accuracy_std: standard deviation over shuffles (population), 0..1.
        share: share of the answers that fell back, mean over shuffles.
        cost: counted operations per input relative to SISO at the mean length, fallback included.
        correct: (M,) float64, share of the shuffles in which each input was answered correctly, 0..1.
    """

    threshold: float
    accuracy_mean: float
    accuracy_std: float
    share: float
    cost: float
    correct: Tensor = field(repr=False)


@torch.no_grad()
def evaluate_fallback(
    model: MultiplexedClassifier,
    features: Features,
    thresholds: Sequence[float],
    shuffles: int = 10,
    seed: int = 0,
    batch_size: int = 128,
    grouping: Grouping = "random",
) -> list[FallbackPoint]:
    """Accuracy and cost at every threshold, computed from the same forward passes.

    Args:
        model: any method that can fall back, at any N; an exit head can.
        features: the split, with a teacher, whose answer replaces one that falls back.
        thresholds: confidences in 0..1.
        shuffles: number of groupings, as in :func:`revmux.training.evaluation.evaluate`.
        seed: seed of the shuffles.
        batch_size: inputs per forward pass.
        grouping: how groups are formed.

    Raises:
        UserError: a threshold outside 0..1, a method that cannot fall back, or features without a teacher.
    """
    for threshold in thresholds:
        check_threshold(threshold, model.method)
    shuffles = 1 if model.num_inputs == 1 else shuffles
    grouped, confidences, plain = [], [], []
    with evaluating(model):
        for shuffle in range(shuffles):
            groups = evaluation_groups(grouping, features.lengths, model.num_inputs, seed, shuffle)
            labels, teacher, scores = predict(model, features, groups, batch_size)
            if teacher is None:
                raise UserError(
                    "the features have no teacher, so there is no answer to fall back to; open them with a teacher"
                )
            grouped.append(labels == features.labels)
            confidences.append(confidence(scores))
            plain.append(teacher == features.labels)
    alone, own, sure = torch.stack(plain), torch.stack(grouped), torch.stack(confidences)  # (shuffles, M) each
    length = max(1, round(float(features.lengths.double().mean())))
    cost = relative_cost(model.backbone, model.method, model.prefill_layers, length)
    resumed = resume_cost(model.backbone, model.prefill_layers, length)
    points = []
    for threshold in thresholds:
        fell = sure < threshold  # (shuffles, M)
        correct = torch.where(fell, alone, own).double()
        each = correct.mean(dim=1)  # (shuffles,)
        share = float(fell.double().mean())
        points.append(
            FallbackPoint(
                threshold=threshold,
                accuracy_mean=float(each.mean()),
                accuracy_std=float(each.std(correction=0)),
                share=share,
                cost=cost + share * resumed,
                correct=correct.mean(dim=0),
            )
        )
    return points
