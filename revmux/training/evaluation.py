"""Accuracy and agreement with SISO, averaged over random groupings, since grouping matters (paper section 4.1)."""

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
    """The figures of one evaluation.

    Attributes:
        accuracy_mean: mean over shuffles, 0..1.
        accuracy_std: standard deviation over shuffles (population), 0..1.
        siso_agreement: share of inputs that get the same label from the plain model, mean over shuffles; NaN if the
            features have no teacher.
        siso_accuracy: accuracy of the plain model on the same inputs; NaN if the features have no teacher.
        accuracies: one accuracy per shuffle.
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
    """Evaluate over shuffles of the inputs; under torch.distributed, every worker evaluates its share of the groups.

    Args:
        model: any method at any N.
        features: the split, with or without a teacher.
        shuffles: number of random groupings. At N = 1 there is only one, since every grouping gives the same answers.
        seed: seed of the first shuffle; each later one adds 1.
        batch_size: inputs per forward pass.
        on_shuffle: called after each shuffle with the number of shuffles done, their total and the mean accuracy so far.
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
    """The predictions of a model for M inputs.

    Attributes:
        labels: (M,) long on the CPU, predicted classes.
        teacher: (M,) long on the CPU, the plain model's classes; None if the features have no teacher.
        scores: (M, C) float32 on the CPU, label scores before softmax.
    """

    labels: Tensor
    teacher: Tensor | None
    scores: Tensor


@torch.no_grad()
def predict(model: MultiplexedClassifier, features: Features, groups: Tensor, batch_size: int = 128) -> Predictions:
    """Predict the class of every input with the groups given, and return the teacher's classes beside them.

    Args:
        model: in eval mode.
        features: the split.
        groups: (G, N) long, rows of the split; every input at least once.
        batch_size: inputs per forward pass.
    """
    rank, world = rank_and_world()
    longest = features.lengths[groups].amax(dim=1)  # (G,)
    ordered = groups[longest.argsort(descending=True)][rank::world]  # groups of similar length share a batch
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
        labels, teacher, scores = _max_over_workers(labels), _max_over_workers(teacher), _max_over_workers(scores)
    return Predictions(labels, None if bool((teacher < 0).any()) else teacher, scores)


def _max_over_workers(own: Tensor) -> Tensor:
    """The elementwise maximum over all workers; a worker has -1 or -inf for inputs that another worker processed."""
    shared = own.cuda() if dist.get_backend() == "nccl" else own
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu()
