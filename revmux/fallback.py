"""Fall-back by confidence: an answer that is not sure enough resumes alone from its prefilled state, not from the start.

An input that shared a pass still has its own states after layer l. Where the group's answer to it is not sure, layers
l+1..L and the model's own head run on those, and it is answered exactly as the plain model would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.backbone.base import evaluating
from revmux.cost import relative_cost, resume_cost
from revmux.errors import UserError
from revmux.evaluation import predict
from revmux.features import Features
from revmux.grouping import shuffled_groups
from revmux.methods import Method
from revmux.model import MultiplexedClassifier


def confidence(scores: Tensor) -> Tensor:
    """How sure an answer is: the probability of its likeliest class.

    Args:
        scores: (..., C) before softmax; with one class only, which is scored by a sigmoid, yes and no are the classes.

    Returns:
        (...), from 1/C to 1.
    """
    if scores.shape[-1] == 1:
        yes = scores.float().sigmoid().squeeze(-1)
        return yes.maximum(1 - yes)
    return scores.float().softmax(-1).amax(-1)


def resume(backbone: Backbone, prefilled: HiddenState) -> Tensor:
    """Each input alone through the layers that it has not passed yet, and the model's own head.

    Args:
        backbone: frozen.
        prefilled: B plain inputs at depth l.

    Returns:
        (B, C) label scores, the plain model's.
    """
    state = backbone.run(prefilled, backbone.num_layers)
    return backbone.classify(backbone.answers(state)[:, 0]).float()


def check_threshold(threshold: float, method: Method, source: str = "") -> None:
    """Refuse a threshold that is none, and one for a method whose prefill is not the plain model's.

    Args:
        threshold: 0 switches the fall-back off, which every method serves.
        method: of the adapter.
        source: where the adapter came from, for the message.

    Raises:
        UserError: naming the threshold or the method.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"the fall-back threshold is {threshold}; choose a confidence in 0..1, 0 for no fall-back")
    if threshold > 0 and (method.prepares_tokens or method.tunes_backbone):
        why = "changes the tokens of its inputs" if method.prepares_tokens else "tunes the backbone"
        raise UserError(
            f"adapter {source or method.name} ({method.name}) cannot fall back: the method {why}, so its prefilled "
            "states are not the plain model's; set the threshold to 0"
        )


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
        shuffles: how often the inputs are grouped anew, as in :func:`revmux.evaluation.evaluate`.
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
