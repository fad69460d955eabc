"""Accuracy and cost of fall-back at each threshold, over shuffles."""

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
from revmux.grouping import shuffled_groups
from revmux.model import MultiplexedClassifier
from revmux.training.evaluation import predict


@dataclass(frozen=True)
class FallbackPoint:
    """One threshold, measured over shuffles.

    Attributes:
        threshold: confidence below which an answer falls back; 0 is none.
        accuracy_mean: mean over shuffles, 0..1.
        accuracy_std: spread over shuffles (population), 0..1.
        share: of the answers that fell back, mean over shuffles.
        cost: counted operations an input relative to SISO at the mean length, the fall-back included.
        correct: (M,) float64, how often each input was answered rightly, 0..1 over the shuffles.
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
) -> list[FallbackPoint]:
    """What every threshold gains and costs; all of them from the same passes.

    Args:
        model: any method that can fall back, at any N; an exit head too.
        features: the split, with teacher: where an answer falls back, the plain model's is taken.
        thresholds: confidences in 0..1.
        shuffles: how often the inputs are grouped anew, as in :func:`revmux.training.evaluation.evaluate`.
        seed: of the first shuffle.
        batch_size: inputs a forward pass.

    Raises:
        UserError: a threshold outside 0..1, a method that cannot fall back, or features without teacher.
    """
    for threshold in thresholds:
        check_threshold(threshold, model.method)
    shuffles = 1 if model.num_inputs == 1 else shuffles
    shared, sure, plain = [], [], []
    with evaluating(model):
        for shuffle in range(shuffles):
            groups = shuffled_groups(len(features), model.num_inputs, seed + shuffle)
            labels, teacher, scores = predict(model, features, groups, batch_size)
            if teacher is None:
                raise UserError(
                    "the features have no teacher, so there is no answer to fall back to; open them with one"
                )
            shared.append(labels == features.labels)
            sure.append(confidence(scores))
            plain.append(teacher == features.labels)
    alone, own, confident = torch.stack(plain), torch.stack(shared), torch.stack(sure)  # (shuffles, M) each
    length = max(1, round(float(features.lengths.double().mean())))
    cost = relative_cost(model.backbone, model.method, model.prefill_layers, length)
    resumed = resume_cost(model.backbone, model.prefill_layers, length)
    points = []
    for threshold in thresholds:
        fell = confident < threshold  # (shuffles, M)
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
