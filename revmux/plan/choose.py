"""Choosing the cheapest system for an allowed loss of accuracy, by Pareto Testing.

Every system is compared with the plain model (SISO) on the same inputs, so its loss is a mean of paired differences: per
input, how often SISO is correct minus how often the system is. The best of many systems looks better than it is.
Therefore some inputs find the systems and others test them (Laufer-Goldshtein et al., 2022, arXiv 2210.07913):

- The search finds the front of all systems, see :mod:`revmux.plan.search`. It promises nothing.
- The systems of the front are tested one after another, those with the lowest expected bound first. A system is accepted
  if the upper confidence bound of its loss is inside the allowance.

All systems that a plan accepts keep the allowance together with the goal's confidence. The error probability is divided
by the fallback procedure (Wiens and Dmitrienko, 2005): most of it belongs to the first test, and each of the next tests
has a smaller share of its own. An accepted system passes on what it had, so the tests of a sequence without a refusal
have nearly the whole error probability. A refusal costs what was passed on, and the tests end when nothing is left.

:func:`verify` then compares the served systems with SISO once, on inputs that were not used to choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from revmux.errors import UserError
from revmux.plan.candidate import Candidate, siso_candidate
from revmux.plan.config import Goal
from revmux.plan.interval import Floats, loss_bound, loss_interval

Answer = Callable[[Candidate], Floats]
"""Runs a system on the inputs of the tests; returns how often it was correct on each, 0..1."""

STEP = 0.03
"""Two systems of the sequence differ in cost by at least this share."""
BUDGET = (0.7, 0.2, 0.1)
"""Shares of the error probability that the first tests have of their own."""


@dataclass(frozen=True)
class Judged:
    """A candidate with its loss.

    Attributes:
        candidate: the system.
        search_loss: points lost against SISO on the inputs of the search, which chose it for the front.
        loss: points lost on the inputs of the tests; None if it was not tested. Negative if it is better than SISO.
        bound: upper confidence bound of the loss, in points, at the confidence of its test; None if it was not tested.
        fits: whether it is accepted and meets the goal.
    """

    candidate: Candidate
    search_loss: float
    loss: float | None = None
    bound: float | None = None
    fits: bool = False

    @property
    def best_loss(self) -> float:
        """The loss of the test if there was one, else of the search."""
        return self.search_loss if self.loss is None else self.loss


@dataclass(frozen=True)
class Choice:
    """The systems chosen to be served.

    Attributes:
        goal: the allowance or throughput wanted.
        chosen: the chosen system, whose bound is the promise; None if no system meets the goal.
        widths: the systems to serve. If the chosen one is a ladder, only that. Otherwise the cheapest accepted single
            adapter at each N that is worth serving, narrowest first. Each is cheaper than every narrower one, and the
            last one is the chosen system.
        judged: the systems of the sequence, single adapters without threshold, and SISO, cheapest first.
        compared: number of systems from which the sequence was selected.
        inputs: number of inputs of the tests.
        nearest: if no system meets the goal, the one that misses it by least.
        shortfall: how much it misses by, in ``shortfall_unit``.
        shortfall_unit: ``points`` of accuracy or ``times`` SISO's throughput.
    """

    goal: Goal
    chosen: Judged | None
    widths: list[Judged]
    judged: list[Judged]
    compared: int
    inputs: int
    nearest: Judged | None = None
    shortfall: float = 0.0
    shortfall_unit: str = ""

    @property
    def siso(self) -> Judged:
        """The plain model."""
        return next(one for one in self.judged if one.candidate.is_plain)


Outcome = Literal["proven", "not proven", "exceeded"]


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
        outcome: ``proven`` if the whole interval is inside the allowance, ``not proven`` if only the observed loss is,
            ``exceeded`` if the observed loss is above the allowance.
    """

    inputs: int
    accuracy: float
    siso_accuracy: float
    loss: float
    lower: float
    upper: float
    confidence: float
    allowance: float | None
    outcome: Outcome


def safest_first(candidates: Sequence[Candidate], step: float = STEP) -> list[Candidate]:
    """The systems to test, from the safest to the cheapest: the front of expected bound and cost, below SISO's cost.

    Args:
        candidates: systems with their answers to the inputs of the search.
        step: a system is left out if it is not cheaper than the one before by this share, except for the cheapest of all.
    """
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.cost, one.expected_bound, one.name)):
        if candidate.cost < 1 and (not best or candidate.expected_bound < best[-1].expected_bound):
            best.append(candidate)
    kept: list[Candidate] = []
    for candidate in reversed(best):
        if not kept or candidate.cost <= (1 - step) * kept[-1].cost or candidate is best[0]:
            kept.append(candidate)
    return kept


def choose(
    search_siso: Floats,
    siso: Floats,
    sequence: Sequence[Candidate],
    answer: Answer,
    goal: Goal,
    others: Sequence[Candidate] = (),
    compared: int | None = None,
) -> Choice:
    """Test a sequence of systems and choose the cheapest that is accepted; SISO is the safe end.

    If the goal is a throughput only, the choice is the safest system that is fast enough.

    Args:
        search_siso: (M₁,) whether SISO was correct on each input of the search, 0 or 1.
        siso: (M₂,) the same for the inputs of the tests.
        sequence: the systems that may be tested, in their order, see :func:`safest_first`. Nothing about them may depend on
            the inputs of the tests.
        answer: runs a system on the inputs of the tests. Called only for the systems that are tested.
        goal: allowance, throughput or both.
        others: systems that are listed beside the sequence and not tested.
        compared: number of systems from which the sequence was selected; None if it was not selected.

    Raises:
        UserError: two systems have the same name, or a system answered another number of inputs.
    """
    plain = siso_candidate(search_siso)
    everything = [plain, *sequence, *others]
    names = [one.name for one in everything]
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"two candidates share a name ({', '.join(repeated)}); give each a unique name")

    def listed(one: Candidate) -> Judged:
        return Judged(one, 100 * (plain.accuracy - one.accuracy))

    def tested(one: Candidate, confidence: float) -> Judged:
        correct = answer(one)
        if correct.shape != siso.shape:
            raise UserError(
                f"{one.name} answered {len(correct)} inputs, but SISO {len(siso)}; compare them on the same inputs"
            )
        differences = siso - correct
        return replace(listed(one), loss=100 * float(differences.mean()), bound=loss_bound(differences, confidence))

    safe = [Judged(plain, 0.0, 0.0, 0.0, _is_fast(plain, goal))]
    refused: list[Judged] = []
    fast = [one for one in sequence if _is_fast(one, goal)]
    if goal.allowance is None:
        if fast and not safe[0].fits:
            safe.append(replace(tested(fast[0], goal.confidence), fits=True))
    else:
        passed_on = 0.0
        for one, share in zip_longest(fast or sequence, BUDGET, fillvalue=None):
            level = passed_on + (share or 0.0) * (1 - goal.confidence)
            if one is None or not level:
                break
            result = tested(one, 1 - level)
            accepted = result.bound is not None and result.bound <= goal.allowance
            passed_on = level if accepted else 0.0
            if accepted:
                safe.append(replace(result, fits=_is_fast(one, goal)))
            else:
                refused.append(result)
    known = {one.candidate.name: one for one in (*safe, *refused)}
    judged = sorted((known.get(one.name) or listed(one) for one in everything), key=_by_cost)
    about = compared or len(everything)
    fitting = sorted((one for one in safe if one.fits), key=_by_cost)
    if not fitting:
        assert goal.throughput is not None  # SISO meets every allowance
        if fast and refused and goal.allowance is not None:
            nearest = min(refused, key=lambda one: one.bound or 0.0)
            over = (nearest.bound or 0.0) - goal.allowance
            return Choice(goal, None, [], judged, about, len(siso), nearest, over, "points")
        nearest = min(safe, key=_by_cost) if goal.allowance is not None else judged[0]
        gap = goal.throughput - 1 / nearest.candidate.cost
        return Choice(goal, None, [], judged, about, len(siso), nearest, gap, "times")
    return Choice(goal, fitting[0], _widths(fitting, fitting[0]), judged, about, len(siso))


def _by_cost(one: Judged) -> tuple[float, float, str]:
    return (one.candidate.cost, one.search_loss, one.candidate.name)


def _is_fast(candidate: Candidate, goal: Goal) -> bool:
    return goal.throughput is None or 1 / candidate.cost >= goal.throughput


def _widths(accepted: Sequence[Judged], chosen: Judged) -> list[Judged]:
    """The cheapest accepted single adapter at each N up to the chosen one's, unless a narrower one is no dearer.

    At N = 1 this is an exit head. The plain model is always served. All stages of a server share one ladder, so a ladder
    is served alone.
    """
    if chosen.candidate.is_ladder or chosen.candidate.is_plain:
        return [chosen]
    kept: list[Judged] = []
    single = [one for one in accepted if not one.candidate.is_ladder and not one.candidate.is_plain]
    for width in sorted({one.candidate.num_inputs for one in single}):
        if width > chosen.candidate.num_inputs:
            break
        best = next(one for one in single if one.candidate.num_inputs == width)
        if all(best.candidate.cost < other.candidate.cost for other in kept):
            kept.append(best)
    return kept


def verify(siso: Floats, correct: Floats | None, goal: Goal) -> Verification:
    """Compare a served system with SISO, on inputs that were not used to choose it.

    Args:
        siso: (M,) whether SISO was correct, 0 or 1.
        correct: (M,) how often the system was correct on the same inputs, 0..1; None for SISO itself, whose loss is zero
            by definition.
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
        lower, upper = loss_interval(siso - correct, goal.confidence)
    return Verification(
        inputs=len(siso),
        accuracy=float(correct.mean()),
        siso_accuracy=float(siso.mean()),
        loss=loss,
        lower=lower,
        upper=upper,
        confidence=goal.confidence,
        allowance=goal.allowance,
        outcome=outcome_of(loss, upper, goal.allowance),
    )


def outcome_of(loss: float, upper: float, allowance: float | None) -> Outcome:
    """The result of a verification; without an allowance, everything is allowed."""
    if allowance is None or upper <= allowance:
        return "proven"
    return "not proven" if loss <= allowance else "exceeded"


def worst_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of several verifications together."""
    order: tuple[Outcome, ...] = ("proven", "not proven", "exceeded")
    return order[max(order.index(outcome) for outcome in outcomes)]
