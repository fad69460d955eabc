"""The front over all systems that trained adapters can form: each alone, with a fallback, and as stages of a ladder.

Every adapter has answered the same inputs, and its correctness and confidence are stored. What a ladder would answer
follows from them without another forward pass: an input has the answer of the first stage whose confidence reaches its
threshold, or else the plain model's. All thresholds of all stages are searched together, with matrix products over the
stored answers. A system is on the front if no cheaper one has a lower expected bound, see
:func:`revmux.plan.interval.expected_bound`.

The groups of a later stage hold only the inputs that go on to it, while the stored answers come from groups of all
inputs. Accuracy in a search is therefore an estimate; the systems of the front run as ladders before one is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.interval import Floats, expected_bound

QUANTILES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Shares of an adapter's least confident answers at which thresholds are placed by default."""
DIGITS = 6
"""Decimal places of a threshold."""
MIN_SHARE = 0.02
"""Least share of all inputs that a later stage is searched for; fewer go to the plain model without another stage."""
MAX_PREFIXES = 1000
"""Most combinations of earlier stages that a third stage is added to."""


@dataclass(frozen=True)
class StageScores:
    """The stored answers of one adapter, over S groupings of M inputs.

    Attributes:
        stage: the adapter, without threshold.
        correct: (S, M) whether each input was answered correctly.
        confidence: (S, M) confidence of each answer, 0..1.
        cost: counted operations per input in full groups, relative to SISO.
        prefill_cost: the part of it up to layer l.
        resume_cost: counted operations of resuming one input alone after layer l, relative to SISO.
        can_go_on: whether an input that the adapter is unsure about can go on, and can reach it from another stage.
        agrees: (S, M) whether each answer is the plain model's.
        scores: (S, M, C) label scores.
        lengths: (M,) tokens per input.
        follows: the adapters of the stages before it, if the confidence was learned for these; None if it may follow any.
    """

    stage: PlannedStage
    correct: NDArray[np.bool_] = field(repr=False)
    confidence: NDArray[np.float32] = field(repr=False)
    cost: float
    prefill_cost: float
    resume_cost: float
    can_go_on: bool = True
    agrees: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), bool), repr=False)
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32), repr=False)
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    follows: tuple[str, ...] | None = None

    def joined(self, other: StageScores) -> StageScores:
        """The answers of the same adapter to these inputs and to others."""
        return replace(
            self,
            correct=np.concatenate([self.correct, other.correct], axis=1),
            confidence=np.concatenate([self.confidence, other.confidence], axis=1),
            agrees=np.concatenate([self.agrees, other.agrees], axis=1),
            scores=np.concatenate([self.scores, other.scores], axis=1),
            lengths=np.concatenate([self.lengths, other.lengths]),
        )


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        front: the systems that no other one beats in cost and expected bound, cheapest first.
        alone: every adapter without threshold.
        compared: number of systems that were compared, SISO included.
    """

    front: list[Candidate]
    alone: list[Candidate]
    compared: int


def search(
    scores: Sequence[StageScores],
    siso: Floats,
    thresholds: Sequence[float] | None = None,
    max_stages: int = 3,
    tested: int | None = None,
    confidence: float = 0.95,
) -> Found:
    """Find the front of counted cost and expected bound over single adapters and ladders.

    A second stage is searched for every first stage and threshold. A third one is added to the pairs of the front of
    two stages only, with every threshold of the second stage.

    Args:
        scores: the adapters' answers to the same M inputs.
        siso: (M,) whether SISO was correct, 0 or 1.
        thresholds: thresholds to consider for every adapter; None chooses them from its confidences.
        max_stages: most adapters of a ladder.
        tested: number of inputs on which the systems will be tested; None for M.
        confidence: of these tests.
    """
    table = _Table(scores, siso, thresholds, tested or len(siso), confidence)
    alone = [table.candidate((row,)) for row in table.final]
    best, compared = _Front(), 1
    prefixes = table.root()
    for depth in range(max_stages):
        points, number = table.extend(prefixes)
        compared += number
        best = best.joined(points)
        if depth + 1 < max_stages:
            prefixes = table.prefixes(best, depth + 1)
        if not len(prefixes.last):
            break
    return Found([table.candidate(rows) for rows in best.systems], alone, compared)


Rows = tuple[int, ...]
"""A system: for each stage, the row of :class:`_Table` with its adapter and threshold."""


@dataclass(frozen=True)
class _Prefixes:
    """P combinations of earlier stages.

    Attributes:
        systems: their rows.
        last: (P,) adapter of the last stage; -1 if there is no stage yet.
        unsure: (P, K) whether each answer is still open.
        lost: (P,) number of final answers that are wrong where the plain model is right, minus the opposite.
        differing: (P,) number of final answers that are right where the plain model is wrong, or the opposite.
        cost: (P,) cost per input so far.
    """

    systems: list[Rows]
    last: NDArray[np.int64]
    unsure: NDArray[np.float32]
    lost: Floats
    differing: Floats
    cost: Floats


@dataclass(frozen=True)
class _Front:
    """Systems with their cost and expected bound, cheapest first in a front."""

    systems: list[Rows] = field(default_factory=list)
    cost: Floats = field(default_factory=lambda: np.zeros(0))
    bound: Floats = field(default_factory=lambda: np.zeros(0))

    def joined(self, other: _Front) -> _Front:
        """The front of both."""
        cost, bound = np.r_[self.cost, other.cost], np.r_[self.bound, other.bound]
        kept = _undominated(cost, bound)
        own = len(self.systems)
        systems = [self.systems[at] if at < own else other.systems[at - own] for at in kept.tolist()]
        return _Front(systems, cost[kept], bound[kept])


def _undominated(cost: Floats, bound: Floats) -> NDArray[np.int64]:
    """The systems that no other one beats in both figures, cheapest first."""
    order = np.lexsort((bound, cost))
    lowest = np.minimum.accumulate(np.r_[np.inf, bound[order]])[:-1]
    return order[bound[order] < lowest - 1e-9]


class _Table:
    """One row per adapter and threshold, over K = S · M answers.

    Attributes:
        final: the row of each adapter without threshold.
    """

    def __init__(
        self,
        scores: Sequence[StageScores],
        siso: Floats,
        thresholds: Sequence[float] | None,
        tested: int,
        confidence: float,
    ) -> None:
        self.scores = list(scores)
        self.tested, self.level = tested, confidence
        self.shuffles = max((len(one.correct) for one in scores), default=1)
        self.siso = siso
        self.plain = np.tile(siso.astype(np.float32), self.shuffles)  # (K,)
        self.total = len(self.plain)
        self.final: list[int] = []
        adapters: list[int] = []
        limits: list[float] = []
        for index, one in enumerate(self.scores):
            steps = _thresholds(one, thresholds) if one.can_go_on else []
            if one.follows is None:
                self.final.append(len(adapters))
                steps = [0.0, *steps]
            adapters += [index] * len(steps)
            limits += steps
        self.adapter, self.limit = np.array(adapters, dtype=np.int64), np.array(limits)
        self.unsure = np.zeros((len(adapters), self.total), np.float32)  # (R, K)
        self.right = np.zeros_like(self.unsure)  # (R, K), whether the answer is final and correct
        self.lost = np.zeros_like(self.unsure)  # (R, K), SISO's correctness minus that of a final answer
        for row, (index, limit) in enumerate(zip(adapters, limits)):
            one = self.scores[index]
            self.unsure[row] = self._flat(one.confidence) < np.float32(limit)
            self.right[row] = self._flat(one.correct) * (1 - self.unsure[row])
            self.lost[row] = self.plain * (1 - self.unsure[row]) - self.right[row]

    def _flat(self, values: NDArray[np.float32] | NDArray[np.bool_]) -> NDArray[np.float32]:
        """(S, M) to (K,); the one grouping of an adapter with N = 1 counts for all."""
        return np.broadcast_to(values, (self.shuffles, values.shape[1])).reshape(-1).astype(np.float32)

    def root(self) -> _Prefixes:
        """No stage yet: all answers are open and nothing is paid."""
        return _Prefixes(
            [()], np.array([-1]), np.ones((1, self.total), np.float32), np.zeros(1), np.zeros(1), np.zeros(1)
        )

    def extend(self, prefixes: _Prefixes) -> tuple[_Front, int]:
        """The front of all systems that add one row to a prefix and then fall back to the plain model, and their number."""
        lost = (prefixes.lost[:, None] + prefixes.unsure @ self.lost.T) / self.total  # (P, R)
        differing = (prefixes.differing[:, None] + prefixes.unsure @ np.abs(self.lost).T) / self.total  # (P, R)
        bound = self._bound(lost, differing)
        onward = prefixes.unsure @ self.unsure.T / self.total  # (P, R), share that reaches the plain model
        resume = self._per_row([one.resume_cost for one in self.scores])
        cost = self._stage_cost(prefixes) + onward * resume
        valid = self._valid(prefixes)
        first, second = np.nonzero(valid)
        kept = _undominated(cost[first, second], bound[first, second])  # of millions of systems, a few hundred
        front, rows = first[kept], second[kept]
        systems = [(*prefixes.systems[p], r) for p, r in zip(front.tolist(), rows.tolist())]
        return _Front(systems, cost[front, rows], bound[front, rows]), len(first)

    def prefixes(self, best: _Front, depth: int) -> _Prefixes:
        """The combinations that another stage may be added to.

        Args:
            best: the front so far.
            depth: number of stages of the combinations. All are used for one stage, those of the front's adapters with
                all thresholds of the last stage for more.
        """
        with_threshold = [row for row in range(len(self.limit)) if self.limit[row] > 0]
        if depth == 1:
            first = [not self.scores[index].follows for index in self.adapter.tolist()]
            systems: list[Rows] = [(row,) for row in with_threshold if first[row]]
        else:
            bases = dict.fromkeys(
                (rows[:-1], int(self.adapter[rows[-1]])) for rows in best.systems if len(rows) == depth
            )
            systems = [
                (*base, row) for base, adapter in bases for row in with_threshold if self.adapter[row] == adapter
            ]
            systems = systems[:: -(-len(systems) // MAX_PREFIXES) or 1]
        unsure = np.ones((len(systems), self.total), np.float32)
        lost, differing, cost = (np.zeros(len(systems)) for _ in range(3))
        last = np.full(len(systems), -1)
        for stage in range(depth):
            rows = np.array([system[stage] for system in systems], dtype=np.int64)
            before = [one.prefill_cost for one in self.scores]
            paid = np.array([before[index] if index >= 0 else 0.0 for index in last.tolist()])
            own = np.array([self.scores[index].cost for index in self.adapter[rows].tolist()])
            cost += unsure.mean(axis=1) * (own - paid)
            lost += (unsure * self.lost[rows]).sum(axis=1)
            differing += (unsure * np.abs(self.lost[rows])).sum(axis=1)
            unsure *= self.unsure[rows]
            last = self.adapter[rows]
        return _Prefixes(systems, last, unsure, lost, differing, cost)

    def _stage_cost(self, prefixes: _Prefixes) -> Floats:
        """(P, R) cost per input with one more stage: the plain layers in between and a share of a full group."""
        prefill = np.array([*(one.prefill_cost for one in self.scores), 0.0])[prefixes.last]  # (P,); -1 is the last
        own = self._per_row([one.cost for one in self.scores])
        reached = prefixes.unsure.mean(axis=1, dtype=np.float64)
        cost: Floats = prefixes.cost[:, None] + reached[:, None] * (own[None] - prefill[:, None])
        return cost

    def _valid(self, prefixes: _Prefixes) -> NDArray[np.bool_]:
        """(P, R) whether a row may follow.

        Its prefill is no shallower, it is another adapter that can go on, and if its confidence was learned, then after
        these stages.
        """
        layers = np.array([one.stage.prefill_layers for one in self.scores])
        usable = np.array([one.can_go_on for one in self.scores])
        names = [one.stage.adapter for one in self.scores]
        valid = np.ones((len(prefixes.last), len(self.adapter)), dtype=bool)
        reached = prefixes.unsure.mean(axis=1)
        for at, system in enumerate(prefixes.systems):
            before = tuple(names[index] for index in self.adapter[list(system)].tolist())
            fits = np.array([one.follows is None or one.follows == before for one in self.scores], dtype=bool)
            if not system:
                valid[at] = fits[self.adapter]
                continue
            if reached[at] < MIN_SHARE:
                valid[at] = False
                continue
            fits &= usable & (layers >= layers[prefixes.last[at]])
            fits &= [name not in before for name in names]
            valid[at] = fits[self.adapter]
        return valid

    def _per_row(self, values: Sequence[float]) -> Floats:
        return np.array(values)[self.adapter]

    def _bound(self, lost: Floats, differing: Floats) -> Floats:
        return expected_bound(lost, differing, self.total // self.shuffles, self.tested, self.level)

    def candidate(self, rows: Rows) -> Candidate:
        """A system with its answers, averaged over the groupings."""
        open_, right, cost, paid = np.ones(self.total, np.float32), np.zeros(self.total, np.float32), 0.0, 0.0
        stages = []
        for row in rows:
            one = self.scores[int(self.adapter[row])]
            cost += float(open_.mean(dtype=np.float64)) * (one.cost - paid)
            right += open_ * self.right[row]
            open_ = open_ * self.unsure[row]
            paid = one.prefill_cost
            limit = float(self.limit[row])
            share = float(open_.mean(dtype=np.float64))
            stages.append(replace(one.stage, threshold=limit or None, going_on=share))
        last = self.scores[int(self.adapter[rows[-1]])]
        cost += float(open_.mean(dtype=np.float64)) * last.resume_cost
        correct = (right + open_ * self.plain).reshape(self.shuffles, -1).mean(axis=0, dtype=np.float64)
        lost = self.siso - correct
        bound = float(self._bound(np.array(lost.mean()), np.array(np.square(lost).mean())))
        return Candidate(tuple(stages), correct, cost, expected_bound=bound)


def _thresholds(one: StageScores, given: Sequence[float] | None) -> list[float]:
    """The thresholds above 0 of one adapter, each of which sends on other inputs than the one before."""
    steps = given if given is not None else np.quantile(one.confidence, QUANTILES).round(DIGITS).tolist()
    kept: list[float] = []
    sent = 0
    for step in sorted(set(steps)):
        below = int((one.confidence < step).sum())
        if below > sent and step > 0:
            kept.append(float(step))
            sent = below
    return kept
