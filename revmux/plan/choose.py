"""Choosing the cheapest N, l and threshold for an allowed loss of accuracy.

Every system is compared with the plain model (SISO) on the same inputs, the choosing set, so its loss is a mean of
paired differences: per input, how often SISO is correct minus how often the system is. Two rules guard against
choosing a system by luck:

- The upper confidence bound of the loss decides, not the loss itself, and the bounds hold for all candidates at once,
  because the best of many looks better than it is. They come from a multiplier bootstrap of the largest studentised
  error (Chernozhukov, Chetverikov and Kato, 2013), which accounts for how similarly the candidates answer.
- Each bound combines the score limits of the share lost and the share won (Newcombe, 1998; Zou and Donner, 2008).
  They remain valid if few inputs differ: zero differences on few inputs do not give a bound of zero.

:func:`verify` then compares the chosen system with SISO once, on inputs that were not used to choose it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revmux.errors import UserError
from revmux.methods import Method, Siso, method_class
from revmux.plan.config import Goal
from revmux.plan.front import FrontRow, cost_of
from revmux.utils.extras import require

Floats = NDArray[np.float64]
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Candidate:
    """One system that could be served, with its results on the choosing set.

    Attributes:
        name: unique among the candidates.
        method: registered name of the method.
        num_inputs: N.
        prefill_layers: l; for an exit head, the layer that it reads.
        correct: (M,) share of the groupings in which each input was answered correctly, 0..1.
        cost_counted: operations per input relative to SISO, fallback included.
        throughput_ratio: inputs per second relative to SISO on this hardware, fallback included; None if not measured.
        options: settings of the method.
        infonce_weight: λ; NaN if it was not trained with InfoNCE.
        threshold: confidence below which an answer falls back; None without fallback.
        fallback: share of answers that fell back.
        folder: adapter folder; None for SISO.
        run_id: MLflow run that trained it; None if there is none.
    """

    name: str
    method: str
    num_inputs: int
    prefill_layers: int
    correct: Floats = field(repr=False)
    cost_counted: float
    throughput_ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    infonce_weight: float = math.nan
    threshold: float | None = None
    fallback: float = 0.0
    folder: str | None = None
    run_id: str | None = None

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return method_class(self.method)

    @property
    def accuracy(self) -> float:
        """Mean accuracy on the choosing set."""
        return float(self.correct.mean())

    @property
    def cost(self) -> float:
        """Cost per input relative to SISO: the measured one if there is one, else the counted one."""
        return cost_of(self.cost_counted, self.throughput_ratio)

    def row(self, siso_accuracy: float) -> FrontRow:
        """The candidate as a row of tables and plots."""
        return FrontRow(
            name=self.name,
            method=self.method,
            num_inputs=self.num_inputs,
            prefill_layers=self.prefill_layers,
            infonce_weight=self.infonce_weight,
            accuracy=self.accuracy,
            siso_accuracy=siso_accuracy,
            cost_counted=self.cost_counted,
            throughput_ratio=self.throughput_ratio,
            threshold=self.threshold,
            fallback=self.fallback,
        )


@dataclass(frozen=True)
class Judged:
    """A candidate with its loss.

    Attributes:
        candidate: the system.
        loss: points lost against SISO on the choosing set; negative if the system is better.
        bound: upper confidence bound of the loss, in points, which holds for all candidates at once.
        fits: whether it meets the goal.
    """

    candidate: Candidate
    loss: float
    bound: float
    fits: bool


@dataclass(frozen=True)
class Choice:
    """The systems chosen to be served.

    Attributes:
        goal: the allowance or throughput wanted.
        chosen: the chosen system, whose loss is the promise; None if no system meets the goal.
        widths: the system to serve at each N that is worth serving, narrowest first. Each is cheaper than every narrower
            one, and its bound is inside the allowance (without an allowance: no larger than the chosen system's bound).
            The last one is the chosen system.
        judged: every candidate, SISO included, cheapest first.
        nearest: if no system meets the goal, the one that misses it by least.
        shortfall: how much it misses by, in ``shortfall_unit``.
        shortfall_unit: ``points`` of accuracy or ``times`` SISO's throughput.
    """

    goal: Goal
    chosen: Judged | None
    widths: list[Judged]
    judged: list[Judged]
    nearest: Judged | None = None
    shortfall: float = 0.0
    shortfall_unit: str = ""

    @property
    def siso(self) -> Judged:
        """The plain model."""
        return next(one for one in self.judged if one.candidate.kind.is_plain)


@dataclass(frozen=True)
class Verification:
    """The comparison with SISO on inputs that were not used to choose.

    Attributes:
        inputs: number of inputs.
        accuracy: accuracy of the chosen system, 0..1.
        siso_accuracy: accuracy of SISO on the same inputs.
        loss: points lost against SISO.
        lower: lower end of the two-sided confidence interval of the loss, in points.
        upper: upper end of the interval.
        confidence: confidence level of the interval.
        allowance: points that may be lost; None if the goal is a throughput only.
        held: whether the observed loss is inside the allowance.
        proven: whether the whole interval is inside the allowance.
    """

    inputs: int
    accuracy: float
    siso_accuracy: float
    loss: float
    lower: float
    upper: float
    confidence: float
    allowance: float | None
    held: bool
    proven: bool


def siso_candidate(correct: Floats) -> Candidate:
    """The plain model as a candidate: it loses nothing and costs 1."""
    return Candidate(Siso.name, Siso.name, 1, 0, correct, cost_counted=1.0, throughput_ratio=1.0)


def loss_bounds(siso: Floats, correct: Floats, confidence: float, seed: int = 0) -> tuple[Floats, Floats]:
    """Losses against SISO and upper bounds that hold for all systems at once.

    Args:
        siso: (M,) whether SISO was correct, 0 or 1.
        correct: (K, M) how often each of K systems was correct on the same inputs, 0..1.
        confidence: probability that no loss exceeds its bound.
        seed: seed of the bootstrap.

    Returns:
        Observed losses (K,) and their bounds (K,), both in points.
    """
    if len(correct) == 0:
        return np.zeros(0), np.zeros(0)
    differences = siso[None] - correct  # (K, M)
    losses = differences.mean(axis=1, keepdims=True)
    spread = differences.std(axis=1, keepdims=True)
    studentised = np.divide(differences - losses, spread, out=np.zeros_like(differences), where=spread > 0)
    weights = np.random.default_rng(seed).standard_normal((BOOTSTRAP_DRAWS, len(siso)))
    largest = (weights @ studentised.T).max(axis=1) / math.sqrt(len(siso))  # (draws,)
    quantile = max(float(np.quantile(largest, confidence)), _student(confidence, len(siso)))
    return 100 * losses[:, 0], 100 * _loss_interval(differences, quantile)[1]


def choose(siso: Floats, candidates: Sequence[Candidate], goal: Goal, seed: int = 0) -> Choice:
    """Choose the cheapest system whose upper bound of the loss is inside the allowance, overall and at each N.

    Exit heads and SISO compete on equal terms. If the goal is a throughput only, the choice is the system with the
    smallest bound among those that are fast enough. Ties in cost go to the smaller bound, then to the first name.

    Args:
        siso: (M,) whether SISO was correct on each input of the choosing set, 0 or 1.
        candidates: the other systems on the same inputs, one per adapter and fallback threshold.
        goal: allowance, throughput or both.
        seed: seed of the bootstrap.

    Raises:
        UserError: candidates of different inputs, or two with the same name.
    """
    names = [candidate.name for candidate in candidates]
    if len(set(names) | {Siso.name}) <= len(names):
        repeated = sorted(name for name in {*names, Siso.name} if [*names, Siso.name].count(name) > 1)
        raise UserError(f"two candidates share a name ({', '.join(repeated)}); give each a unique name")
    for candidate in candidates:
        if candidate.correct.shape != siso.shape:
            raise UserError(
                f"{candidate.name} answered {len(candidate.correct)} inputs, but SISO {len(siso)}; compare them on the same"
                " inputs"
            )
    losses, bounds = loss_bounds(
        siso,
        np.stack([one.correct for one in candidates]) if candidates else np.zeros((0, len(siso))),
        goal.confidence,
        seed,
    )
    systems = [(siso_candidate(siso), 0.0, 0.0), *zip(candidates, losses.tolist(), bounds.tolist())]
    judged = sorted((Judged(one, loss, bound, _fits(one, bound, goal)) for one, loss, bound in systems), key=_by_cost)
    fitting = [one for one in judged if one.fits]
    if not fitting:
        nearest, shortfall, unit = _nearest(judged, goal)
        return Choice(goal, None, [], judged, nearest, shortfall, unit)
    chosen = fitting[0] if goal.allowance is not None else min(fitting, key=lambda one: (one.bound, *_by_cost(one)))
    return Choice(goal, chosen, _widths(judged, chosen, goal), judged)


def _by_cost(one: Judged) -> tuple[float, float, str]:
    return (one.candidate.cost, one.bound, one.candidate.name)


def _is_safe(bound: float, goal: Goal) -> bool:
    return goal.allowance is None or bound <= goal.allowance


def _is_fast(candidate: Candidate, goal: Goal) -> bool:
    return goal.throughput is None or 1 / candidate.cost >= goal.throughput


def _fits(candidate: Candidate, bound: float, goal: Goal) -> bool:
    return _is_safe(bound, goal) and _is_fast(candidate, goal)


def _widths(judged: Sequence[Judged], chosen: Judged, goal: Goal) -> list[Judged]:
    """The cheapest safe system at each N up to the chosen one's, unless a narrower one is no dearer.

    At N = 1 this is an exit head. The plain model is always served.
    """
    allowed = chosen.bound if goal.allowance is None else goal.allowance
    kept: list[Judged] = []
    adapted = [one for one in judged if not one.candidate.kind.is_plain]
    for width in sorted({one.candidate.num_inputs for one in adapted}):
        if width > chosen.candidate.num_inputs:
            break
        best = next((one for one in adapted if one.candidate.num_inputs == width and one.bound <= allowed), None)
        if width == chosen.candidate.num_inputs:
            best = chosen
        if best is not None and all(best.candidate.cost < other.candidate.cost for other in kept):
            kept.append(best)
    return kept or [chosen]


def _nearest(judged: Sequence[Judged], goal: Goal) -> tuple[Judged, float, str]:
    """The system that misses the goal by least. SISO meets every allowance, so the goal includes a throughput."""
    assert goal.throughput is not None
    fast = [one for one in judged if _is_fast(one.candidate, goal)]
    if fast and goal.allowance is not None:
        nearest = min(fast, key=lambda one: (one.bound, *_by_cost(one)))
        return nearest, nearest.bound - goal.allowance, "points"
    nearest = next(one for one in judged if _is_safe(one.bound, goal))
    return nearest, goal.throughput - 1 / nearest.candidate.cost, "times"


def verify(siso: Floats, correct: Floats | None, goal: Goal) -> Verification:
    """Compare the chosen system with SISO, on inputs that were not used to choose it.

    Args:
        siso: (M,) whether SISO was correct, 0 or 1.
        correct: (M,) how often the chosen system was correct on the same inputs, 0..1; None if SISO itself was
            chosen, whose loss is zero by definition.
        goal: the goal with the allowance and the confidence.

    Raises:
        UserError: the two answered different numbers of inputs.
    """
    loss = lower = upper = 0.0
    if correct is None:
        correct = siso
    elif siso.shape != correct.shape:
        raise UserError(
            f"the chosen system answered {len(correct)} inputs, but SISO {len(siso)}; compare them on the same inputs"
        )
    else:
        loss = 100 * float((siso - correct).mean())
        quantile = _student((1 + goal.confidence) / 2, len(siso))
        lower, upper = (100 * float(end) for end in _loss_interval(siso - correct, quantile))
    return Verification(
        inputs=len(siso),
        accuracy=float(correct.mean()),
        siso_accuracy=float(siso.mean()),
        loss=loss,
        lower=lower,
        upper=upper,
        confidence=goal.confidence,
        allowance=goal.allowance,
        held=goal.allowance is None or loss <= goal.allowance,
        proven=goal.allowance is None or upper <= goal.allowance,
    )


def _loss_interval(differences: Floats, quantile: float) -> tuple[Floats, Floats]:
    """The interval of a mean loss, from the limits of the share lost and the share won.

    The distances of the two limits from their means are combined as the root of the sum of their squares.

    Args:
        differences: (..., M) in -1..1, positive if SISO was correct more often.
        quantile: quantile of the studentised error on each side.

    Returns:
        Lower and upper ends, both (...).
    """
    lost, won = differences.clip(min=0), (-differences).clip(min=0)
    lost_lower, lost_upper = _score_limits(lost, quantile)
    won_lower, won_upper = _score_limits(won, quantile)
    loss, lost_mean, won_mean = differences.mean(axis=-1), lost.mean(axis=-1), won.mean(axis=-1)
    lower = loss - np.hypot(lost_mean - lost_lower, won_upper - won_mean)
    upper = loss + np.hypot(lost_upper - lost_mean, won_mean - won_lower)
    return lower, upper


def _score_limits(shares: Floats, quantile: float) -> tuple[Floats, Floats]:
    """Wilson's limits of a mean share.

    Shares that are means over groupings vary less than single answers of 0 or 1. The number of inputs is increased by
    the ratio of the two variances.

    Args:
        shares: (..., M) in 0..1.
        quantile: quantile of the studentised error.

    Returns:
        Lower and upper limits, both (...).
    """
    mean, variance = shares.mean(axis=-1), shares.var(axis=-1)
    variance_ratio = np.divide(mean * (1 - mean), variance, out=np.ones_like(mean), where=variance > 0)
    inputs = shares.shape[-1] * variance_ratio
    centre = mean + quantile**2 / (2 * inputs)
    reach = quantile * np.sqrt(mean * (1 - mean) / inputs + quantile**2 / (4 * inputs**2))
    scale = 1 + quantile**2 / inputs
    return (centre - reach) / scale, (centre + reach) / scale


def _student(level: float, inputs: int) -> float:
    """Quantile of Student's t for a mean of ``inputs`` values."""
    return float(require("scipy.stats", "plan").t.ppf(level, max(1, inputs - 1)))
