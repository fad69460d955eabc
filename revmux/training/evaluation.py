"""Accuracy and agreement with SISO, averaged over several groupings, since grouping matters (paper section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from revmux.backbone.base import evaluating
from revmux.estimate.flops import Cost, count_flops, plain_cost
from revmux.features.base import Features
from revmux.grouping import Grouping, evaluation_groups, gather_rows, local_rows
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
        cost_grouped: counted operations per input relative to SISO with the groups that were evaluated, mean over
            shuffles; NaN if it was not counted.
        served: the figures with groups by length, as a server forms them; None if they were not evaluated.
    """

    accuracy_mean: float
    accuracy_std: float
    siso_agreement: float
    siso_accuracy: float
    accuracies: list[float] = field(default_factory=list)
    cost_grouped: float = float("nan")
    served: Evaluation | None = None

    def metrics(self) -> dict[str, float]:
        """The scalars by name; those with groups by length have the suffix ``_served``."""
        hidden = {"accuracies", "served"} | ({"cost_grouped"} if math.isnan(self.cost_grouped) else set())
        found = {item.name: float(getattr(self, item.name)) for item in fields(self) if item.name not in hidden}
        if self.served is None:
            return found
        return found | {f"{name}_served": value for name, value in self.served.metrics().items()}


@torch.no_grad()
def evaluate(
    model: MultiplexedClassifier,
    features: Features,
    shuffles: int = 10,
    seed: int = 0,
    batch_size: int = 128,
    on_shuffle: Callable[[int, int, float], None] | None = None,
    grouping: Grouping = "random",
) -> Evaluation:
    """Evaluate over shuffles of the inputs; under torch.distributed, every worker evaluates its share of the groups.

    Args:
        model: any method at any N.
        features: the split, with or without a teacher.
        shuffles: number of groupings. At N = 1 there is only one, since every grouping gives the same answers.
        seed: seed of the shuffles.
        batch_size: inputs per forward pass.
        on_shuffle: called after each shuffle with the number of shuffles done, their total and the mean accuracy so far.
        grouping: how groups are formed.
    """
    shuffles = 1 if model.num_inputs == 1 else shuffles
    correct, agreed, teacher_correct = [], [], 0.0
    with evaluating(model):
        for shuffle in range(shuffles):
            groups = evaluation_groups(grouping, features.lengths, model.num_inputs, seed, shuffle)
            predicted, teacher, _ = predict(model, features, groups, batch_size)
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


def evaluate_both(
    model: MultiplexedClassifier,
    features: Features,
    shuffles: int = 10,
    seed: int = 0,
    on_shuffle: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Evaluate with random groups and with groups as a server forms them, each with its own counted cost.

    At N = 1, both are the same.

    Args:
        model: any method at any N.
        features: the split, with or without a teacher.
        shuffles: number of groupings of each kind.
        seed: seed of the shuffles.
        on_shuffle: see :func:`evaluate`; called for the random groups.
    """

    def figures(grouping: Grouping) -> Evaluation:
        found = evaluate(
            model, features, shuffles, seed, on_shuffle=on_shuffle if grouping == "random" else None, grouping=grouping
        )
        cost = grouped_cost(model, features.lengths, grouping, len(found.accuracies), seed)
        return replace(found, cost_grouped=cost)

    random = figures("random")
    return random if model.num_inputs == 1 else replace(random, served=figures("length"))


def grouped_cost(
    model: MultiplexedClassifier, lengths: Tensor, grouping: Grouping, shuffles: int = 1, seed: int = 0
) -> float:
    """Counted operations per input relative to SISO in groups of inputs of different lengths.

    Each input has its own length in the prefill layers, and that of its group's longest member above. Slots that a short
    last group fills with copies count as work.

    Args:
        model: any method at any N.
        lengths: (M,) tokens per input.
        grouping: how groups are formed.
        shuffles: number of groupings to average over.
        seed: seed of the shuffles.
    """

    def count(length: float) -> Cost:
        return count_flops(model.backbone, model.method, model.prefill_layers, max(1, round(length)))

    own = float(lengths.double().mean())
    groups = [evaluation_groups(grouping, lengths, model.num_inputs, seed, shuffle) for shuffle in range(shuffles)]
    longest = sum(float(lengths[one].amax(dim=1).double().mean()) for one in groups) / shuffles
    slots = groups[0].numel() / len(lengths)  # per input
    alone, shared = count(own), count(longest)
    prefill = shared.prefill * slots if model.method.prepares_tokens else alone.prefill
    above = shared.per_input - shared.prefill
    return (prefill + slots * above) / plain_cost(model.backbone, max(1, round(own))).per_input


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
    # A worker without a group takes no part; split() would return an empty chunk.
    for chunk in ordered.split(max(1, batch_size // model.num_inputs)) if len(ordered) else ():
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
