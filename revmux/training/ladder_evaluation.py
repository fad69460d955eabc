"""Accuracy, shares and counted cost of a ladder, averaged over groupings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from revmux.estimate.flops import LadderCost, ladder_cost
from revmux.features.base import Features
from revmux.grouping import WINDOW, Grouping, evaluation_groups, local_rows
from revmux.ladder import Ladder
from revmux.training.evaluation import Evaluation


@dataclass(frozen=True)
class LadderEvaluation:
    """The figures of a ladder on one split.

    Attributes:
        figures: accuracy and agreement with SISO.
        answered: share of the inputs that each stage answered, mean over shuffles; the plain model first, then stage 1.
        cost: counted operations per input relative to SISO at the mean length, in full groups.
        correct: (M,) float64, share of the shuffles in which each input was answered correctly, 0..1.
    """

    figures: Evaluation
    answered: tuple[float, ...]
    cost: float
    correct: Tensor = field(repr=False)

    @property
    def going_on(self) -> tuple[float, ...]:
        """For each stage, the share of all inputs that neither it nor an earlier stage answered."""
        return going_on(self.answered)

    @property
    def share_on(self) -> tuple[float, ...]:
        """For each stage, the share of its own inputs that it did not answer: ``share_on`` in an adapter's metrics."""
        before = (1.0, *self.going_on)
        return tuple(share / reached if reached else 0.0 for share, reached in zip(self.going_on, before))


def going_on(answered: tuple[float, ...]) -> tuple[float, ...]:
    """For each stage, the share of all inputs that neither it nor an earlier stage answered.

    Args:
        answered: share of the inputs that each stage answered; the plain model first, then stage 1.
    """
    later = (*answered[2:], answered[0])
    return tuple(sum(later[place:]) for place in range(len(later)))


@torch.no_grad()
def evaluate_ladder(
    ladder: Ladder,
    features: Features,
    shuffles: int = 10,
    seed: int = 0,
    batch_size: int = WINDOW,
    grouping: Grouping = "random",
    cost: LadderCost | None = None,
) -> LadderEvaluation:
    """Evaluate a ladder over shuffles of the inputs, in passes as a server runs them.

    Args:
        ladder: the stages.
        features: the split. Its states, if it stores them, are at most as deep as the first stage's prefill. With a
            teacher, the inputs that fall back get the teacher's answers, which are the plain model's.
        shuffles: number of groupings, as in :func:`revmux.training.evaluation.evaluate`.
        seed: seed of the shuffles.
        batch_size: inputs per pass. Later stages form groups inside a pass.
        grouping: how groups are formed, in all stages.
        cost: from :func:`revmux.estimate.flops.ladder_cost` at the mean length; None counts it.

    Raises:
        UserError: the grouping is unknown.
    """
    if all(stage.model.num_inputs == 1 for stage in ladder.stages):
        shuffles = 1  # every grouping gives the same answers
    predictions = [_predict(ladder, features, grouping, seed, shuffle, batch_size) for shuffle in range(shuffles)]
    labels, stages, teacher = (torch.stack(parts) for parts in zip(*predictions))  # (shuffles, M) each
    correct = (labels == features.labels).double()  # (shuffles, M)
    accuracies = correct.mean(dim=1)
    has_teacher = bool((teacher >= 0).all())
    counts = torch.bincount(stages.flatten(), minlength=len(ladder.stages) + 1)
    answered = tuple((counts.double() / stages.numel()).tolist())
    if cost is None:
        length = max(1, round(float(features.lengths.double().mean())))
        cost = ladder_cost([stage.model for stage in ladder.stages], length)
    return LadderEvaluation(
        figures=Evaluation(
            accuracy_mean=float(accuracies.mean()),
            accuracy_std=float(accuracies.std(correction=0)),
            siso_agreement=float((labels == teacher).double().mean()) if has_teacher else math.nan,
            siso_accuracy=float((teacher[0] == features.labels).double().mean()) if has_teacher else math.nan,
            accuracies=accuracies.tolist(),
        ),
        answered=answered,
        cost=cost.at(going_on(answered)),
        correct=correct.mean(dim=0),
    )


def _predict(
    ladder: Ladder, features: Features, grouping: Grouping, seed: int, shuffle: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer every input once.

    Returns:
        The predicted classes, the stages that answered, and the teacher's classes (-1 without a teacher), (M,) each.
    """
    total, width = len(features), ladder.num_inputs
    labels = torch.full((total,), -1)
    stages, teacher = torch.zeros_like(labels), torch.full_like(labels, -1)
    groups = evaluation_groups(grouping, features.lengths, width, seed, shuffle)  # (G, N)
    order = features.lengths
    if grouping == "random":
        longest = features.lengths[groups].amax(dim=1)  # (G,)
        groups = groups[longest.argsort(descending=True)]  # groups of similar length share a pass
        order = torch.from_numpy(np.random.default_rng([seed, shuffle, 1]).permutation(total))
    for chunk in groups.split(max(1, batch_size // width)):
        rows, inside = local_rows(chunk)
        batch = features.batch(rows)
        inside = inside.to(batch.labels.device)
        has_teacher = batch.teacher_scores is not None
        if batch.prefilled is None:
            assert batch.tokens is not None
            found = ladder.classify(batch.tokens, inside, order[rows], resumes=not has_teacher)
        else:
            found = ladder.run(batch.prefilled, inside, order[rows], resumes=not has_teacher)
        labels[rows] = found.scores.argmax(-1).cpu()
        stages[rows] = found.stage
        if batch.teacher_scores is not None:
            teacher[rows] = batch.teacher_scores.argmax(-1).cpu()
            labels[rows] = torch.where(found.fell_back, teacher[rows], labels[rows])
    return labels, stages, teacher
