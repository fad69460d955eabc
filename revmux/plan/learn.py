"""Learned confidences for the stages of a plan, trained on the selection set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from revmux.deferral import Deferral, deferral_features
from revmux.plan.candidate import Candidate
from revmux.plan.interval import Floats
from revmux.plan.search import StageScores
from revmux.utils.extras import require

LEAST = 20
"""Least number of answers of each kind, the plain model's and others, that a confidence is learned from."""
DECAY = 1e-3
"""Weight decay of the logistic model, on features of unit variance."""
MAX_CHAINS = 20
"""Most sequences of adapters whose later stages get learned confidences."""


def first_stages(selection: Sequence[StageScores], scores: Sequence[StageScores]) -> list[StageScores]:
    """Every adapter as a first stage with a learned confidence.

    Args:
        selection: the adapters' answers to the selection set.
        scores: the same adapters' answers to the inputs of the search.
    """
    made = (_learned([learn_from], [one]) for learn_from, one in zip(selection, scores))
    return [one for one in made if one is not None]


def later_stages(
    selection: Sequence[StageScores], scores: Sequence[StageScores], front: Sequence[Candidate]
) -> list[StageScores]:
    """The later stages of the ladders of a front with learned confidences; for the arguments, see :func:`first_stages`."""
    at = {one.stage.adapter: index for index, one in enumerate(scores)}
    chains = dict.fromkeys(
        tuple(stage.adapter for stage in ladder.stages[:depth])
        for ladder in front
        for depth in range(2, len(ladder.stages) + 1)
    )
    made = (
        _learned([selection[at[name]] for name in chain], [scores[at[name]] for name in chain])
        for chain in list(chains)[:MAX_CHAINS]
    )
    return [one for one in made if one is not None]


def _learned(selection: Sequence[StageScores], chain: Sequence[StageScores]) -> StageScores | None:
    """The last adapter of a chain with a confidence learned for it; None if there is too little to learn from."""
    last = chain[-1]
    if not last.can_go_on:
        return None
    deferral = fit_deferral(*_answers(selection), selection[-1].agrees)
    if deferral is None:
        return None
    confidence = deferral.confidence(*_answers(chain)).numpy()
    follows = tuple(one.stage.adapter for one in chain[:-1])
    return replace(last, stage=replace(last.stage, deferral=deferral), confidence=confidence, follows=follows)


def _answers(chain: Sequence[StageScores]) -> tuple[list[Tensor], Tensor]:
    """The scores (S, M, C) of each adapter and the lengths (S, M) of the inputs."""
    shuffles = max(len(one.scores) for one in chain)
    passed = [torch.from_numpy(one.scores).expand(shuffles, -1, -1) for one in chain]
    return passed, torch.from_numpy(chain[0].lengths).expand(shuffles, -1)


def fit_deferral(passed: Sequence[Tensor], lengths: Tensor, agrees: NDArray[np.bool_]) -> Deferral | None:
    """Fit the learned confidence of a stage to answers of the stages so far.

    Args:
        passed: for each stage so far, the scores (S, M, C).
        lengths: (S, M) tokens per input.
        agrees: (S or 1, M) bool, whether the answer of the last stage is the plain model's.

    Returns:
        The model, or None if fewer than :data:`LEAST` answers agree or differ.
    """
    features = deferral_features(passed, lengths).flatten(0, 1).double().numpy()  # (S · M, F)
    target = np.broadcast_to(agrees, lengths.shape).reshape(-1)
    if min(target.sum(), (~target).sum()) < LEAST:
        return None
    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    inputs = np.c_[(features - mean) / scale, np.ones(len(features))]
    sign = np.where(target, 1.0, -1.0)

    def loss(weights: Floats) -> tuple[float, Floats]:
        logit = sign * (inputs @ weights)
        slope = -sign / (1 + np.exp(np.minimum(logit, 500))) / len(sign)
        decay = DECAY * np.r_[weights[:-1], 0.0]
        return float(np.logaddexp(0, -logit).mean() + decay @ weights / 2), slope @ inputs + decay

    found = require("scipy.optimize", "plan").minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B").x
    weights = found[:-1] / scale
    return Deferral(tuple(weights.tolist()), float(found[-1] - weights @ mean))
