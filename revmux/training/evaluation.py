"""Accuracy and agreement with SISO over shuffles: who shares a group with whom matters (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from revmux.backbone.base import evaluating
from revmux.features.base import Features
from revmux.grouping import gather_rows, local_rows, shuffled_groups
from revmux.model import MultiplexedClassifier
from revmux.training.distributed import rank_and_world


@dataclass(frozen=True)
class Evaluation:
    """What a model answered over all shuffles.

    Attributes:
        accuracy_mean: mean over shuffles, 0..1.
        accuracy_std: spread over shuffles (population), 0..1.
        siso_agreement: share of inputs labelled as the plain model labels them, mean over shuffles; NaN
            where the features have no teacher.
        siso_accuracy: the plain model's accuracy on the same inputs; NaN likewise.
        accuracies: one a shuffle.
    """

    accuracy_mean: float
    accuracy_std: float
    siso_agreement: float
    siso_accuracy: float
    accuracies: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """The scalars by name."""
        return {name: value for name, value in asdict(self).items() if name != "accuracies"}


@torch.no_grad()
def evaluate(
    model: MultiplexedClassifier,
    features: Features,
    shuffles: int = 10,
    seed: int = 0,
    batch_size: int = 128,
    on_shuffle: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Evaluate over shuffles of the inputs; under torch.distributed every worker takes its share of the groups.

    Args:
        model: any method at any N.
        features: the split, with or without teacher.
        shuffles: how often the inputs are grouped anew. A method without groups (N = 1) is asked once, since
            every shuffle answers the same.
        seed: of the first shuffle.
        batch_size: inputs per forward pass.
        on_shuffle: called after each shuffle with the shuffles done, their total and the mean accuracy so far.
    """
    shuffles = 1 if model.num_inputs == 1 else shuffles
    total = len(features)
    correct, agreed, teacher_correct = [], [], 0.0
    with evaluating(model):
        for shuffle in range(shuffles):
            predicted, teacher, _ = predict(
                model, features, shuffled_groups(total, model.num_inputs, seed + shuffle), batch_size
            )
            correct.append(float((predicted == features.labels).double().mean()))
            if teacher is not None:
                agreed.append(float((predicted == teacher).double().mean()))
                teacher_correct = float((teacher == features.labels).double().mean())
            if on_shuffle is not None:
                on_shuffle(shuffle + 1, shuffles, sum(correct) / len(correct))
    accuracies = torch.tensor(correct, dtype=torch.float64)
    return Evaluation(
        accuracy_mean=float(accuracies.mean()),
        accuracy_std=float(accuracies.std(correction=0)),
        siso_agreement=sum(agreed) / len(agreed) if agreed else float("nan"),
        siso_accuracy=teacher_correct if agreed else float("nan"),
        accuracies=correct,
    )


class Predictions(NamedTuple):
    """What a model answered to M inputs.

    Attributes:
        labels: (M,) long on the CPU.
        teacher: the same of the plain model, or None.
        scores: (M, C) float32 on the CPU, before softmax.
    """

    labels: Tensor
    teacher: Tensor | None
    scores: Tensor


@torch.no_grad()
def predict(model: MultiplexedClassifier, features: Features, groups: Tensor, batch_size: int = 128) -> Predictions:
    """The class of every input, grouped as told, and the teacher's class.

    Args:
        model: in eval mode.
        features: the split.
        groups: (G, N) long; every input at least once.
        batch_size: inputs a forward pass.
    """
    rank, world = rank_and_world()
    longest = features.lengths[groups].amax(dim=1)  # (G,)
    ordered = groups[longest.argsort(descending=True)][rank::world]  # groups of like length share a batch
    labels = torch.full((len(features),), -1, dtype=torch.long)
    teacher = torch.full_like(labels, -1)
    scores = torch.full((len(features), model.backbone.num_labels), -torch.inf)
    for chunk in ordered.split(max(1, batch_size // model.num_inputs)):
        rows, inside = local_rows(chunk)
        batch = features.batch(rows)
        inside = inside.to(batch.labels.device)
        output = model.run_batch(batch.tokens, batch.prefilled, inside)
        scores[rows] = gather_rows(output.scores, inside, len(rows)).cpu()
        labels[rows] = scores[rows].argmax(-1)
        if batch.teacher_scores is not None:
            teacher[rows] = batch.teacher_scores.argmax(-1).cpu()
    if world > 1:
        labels, teacher, scores = _most(labels), _most(teacher), _most(scores)
    return Predictions(labels, None if bool((teacher < 0).any()) else teacher, scores)


def _most(own: Tensor) -> Tensor:
    """The largest value over all workers, element by element; each has -1 or -inf where another worker answered."""
    shared = own.cuda() if dist.get_backend() == "nccl" else own
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu()
