"""The front over all systems that trained adapters can form: each alone, with a fallback, and as stages of a ladder.

Every adapter has answered the same inputs, and its correctness and confidence are stored. What a ladder would answer
follows from them without another forward pass: an input has the answer of the first stage whose confidence reaches its
threshold, or else the plain model's. All thresholds of all stages are searched together, with matrix products over the
stored answers.

The groups of a later stage hold only the inputs that go on to it, while the stored answers come from groups of all
inputs. Accuracy in a search is therefore an estimate; the systems of the front run as ladders before one is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.interval import Floats

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
    """

    stage: PlannedStage
    correct: NDArray[np.bool_] = field(repr=False)
    confidence: NDArray[np.float32] = field(repr=False)
    cost: float
    prefill_cost: float
    resume_cost: float
    can_go_on: bool = True


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        front: the systems that no other one beats in cost and accuracy, cheapest first.
        alone: every adapter without threshold.
        compared: number of systems that were compared, SISO included.
    """

    front: list[Candidate]
    alone: list[Candidate]
    compared: int


def search(
    scores: Sequence[StageScores], siso: Floats, thresholds: Sequence[float] | None = None, max_stages: int = 3
) -> Found:
    """Find the front over single adapters and ladders, by counted cost.

    A second stage is searched for every first stage and threshold. A third one is added to the pairs of the front of
    two stages only, with every threshold of the second stage.

    Args:
        scores: the adapters' answers to the same M inputs.
        siso: (M,) whether SISO was correct, 0 or 1.
        thresholds: thresholds to consider for every adapter; None chooses them from its confidences.
        max_stages: most adapters of a ladder.
    """
    table = _Table(scores, siso, thresholds)
    alone = [table.candidate((row,)) for row in table.final]
    best, compared = _Front(), 1
    prefixes = table.root()
    for depth in range(max_stages):
        points = table.extend(prefixes)
        compared += len(points.cost)
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
        right: (P,) number of answers that are final and correct.
        cost: (P,) cost per input so far.
    """

    systems: list[Rows]
    last: NDArray[np.int64]
    unsure: NDArray[np.float32]
    right: Floats
    cost: Floats


@dataclass(frozen=True)
class _Front:
    """Systems with their cost and accuracy, cheapest first in a front."""

    systems: list[Rows] = field(default_factory=list)
    cost: Floats = field(default_factory=lambda: np.zeros(0))
    accuracy: Floats = field(default_factory=lambda: np.zeros(0))

    def joined(self, other: _Front) -> _Front:
        """The front of both."""
        cost, accuracy = np.r_[self.cost, other.cost], np.r_[self.accuracy, other.accuracy]
        order = np.lexsort((-accuracy, cost))
        highest = np.maximum.accumulate(np.r_[-np.inf, accuracy[order]])[:-1]
        kept = order[accuracy[order] > highest + 1e-12]
        own = len(self.systems)
        systems = [self.systems[at] if at < own else other.systems[at - own] for at in kept.tolist()]
        return _Front(systems, cost[kept], accuracy[kept])


class _Table:
    """One row per adapter and threshold, over K = S · M answers.

    Attributes:
        final: the row of each adapter without threshold.
    """

    def __init__(self, scores: Sequence[StageScores], siso: Floats, thresholds: Sequence[float] | None) -> None:
        self.scores = list(scores)
        self.shuffles = max((len(one.correct) for one in scores), default=1)
        self.plain = np.tile(siso.astype(np.float32), self.shuffles)  # (K,)
        self.total = len(self.plain)
        self.final: list[int] = []
        adapters: list[int] = []
        limits: list[float] = []
        for index, one in enumerate(self.scores):
            self.final.append(len(adapters))
            steps = _thresholds(one, thresholds) if one.can_go_on else []
            adapters += [index] * (1 + len(steps))
            limits += [0.0, *steps]
        self.adapter, self.limit = np.array(adapters, dtype=np.int64), np.array(limits)
        self.unsure = np.zeros((len(adapters), self.total), np.float32)  # (R, K)
        self.right = np.zeros_like(self.unsure)  # (R, K), whether the answer is final and correct
        for row, (index, limit) in enumerate(zip(adapters, limits)):
            one = self.scores[index]
            self.unsure[row] = self._flat(one.confidence) < np.float32(limit)
            self.right[row] = self._flat(one.correct) * (1 - self.unsure[row])

    def _flat(self, values: NDArray[np.float32] | NDArray[np.bool_]) -> NDArray[np.float32]:
        """(S, M) to (K,); the one grouping of an adapter with N = 1 counts for all."""
        return np.broadcast_to(values, (self.shuffles, values.shape[1])).reshape(-1).astype(np.float32)

    def root(self) -> _Prefixes:
        """No stage yet: all answers are open and nothing is paid."""
        return _Prefixes([()], np.array([-1]), np.ones((1, self.total), np.float32), np.zeros(1), np.zeros(1))

    def extend(self, prefixes: _Prefixes) -> _Front:
        """Every system that adds one row to a prefix and then falls back to the plain model."""
        value = self.right + self.unsure * self.plain  # (R, K)
        accuracy = (prefixes.right[:, None] + prefixes.unsure @ value.T) / self.total  # (P, R)
        onward = prefixes.unsure @ self.unsure.T / self.total  # (P, R), share that reaches the plain model
        resume = self._per_row([one.resume_cost for one in self.scores])
        cost = self._stage_cost(prefixes) + onward * resume
        legal = self._legal(prefixes)
        first, second = np.nonzero(legal)
        systems = [(*prefixes.systems[p], r) for p, r in zip(first.tolist(), second.tolist())]
        return _Front(systems, cost[first, second], accuracy[first, second])

    def prefixes(self, best: _Front, depth: int) -> _Prefixes:
        """The combinations that another stage may be added to.

        Args:
            best: the front so far.
            depth: number of stages of the combinations. All are used for one stage, those of the front's adapters with
                all thresholds of the last stage for more.
        """
        with_threshold = [row for row in range(len(self.limit)) if self.limit[row] > 0]
        if depth == 1:
            systems: list[Rows] = [(row,) for row in with_threshold]
        else:
            bases = dict.fromkeys(
                (rows[:-1], int(self.adapter[rows[-1]])) for rows in best.systems if len(rows) == depth
            )
            systems = [
                (*base, row) for base, adapter in bases for row in with_threshold if self.adapter[row] == adapter
            ]
            systems = systems[:: -(-len(systems) // MAX_PREFIXES) or 1]
        unsure = np.ones((len(systems), self.total), np.float32)
        right, cost = np.zeros(len(systems)), np.zeros(len(systems))
        last = np.full(len(systems), -1)
        for stage in range(depth):
            rows = np.array([system[stage] for system in systems], dtype=np.int64)
            before = [one.prefill_cost for one in self.scores]
            paid = np.array([before[index] if index >= 0 else 0.0 for index in last.tolist()])
            own = np.array([self.scores[index].cost for index in self.adapter[rows].tolist()])
            cost += unsure.mean(axis=1) * (own - paid)
            right += (unsure * self.right[rows]).sum(axis=1)
            unsure *= self.unsure[rows]
            last = self.adapter[rows]
        return _Prefixes(systems, last, unsure, right, cost)

    def _stage_cost(self, prefixes: _Prefixes) -> Floats:
        """(P, R) cost per input with one more stage: the plain layers in between and a share of a full group."""
        prefill = np.array([*(one.prefill_cost for one in self.scores), 0.0])[prefixes.last]  # (P,); -1 is the last
        own = self._per_row([one.cost for one in self.scores])
        reached = prefixes.unsure.mean(axis=1, dtype=np.float64)
        cost: Floats = prefixes.cost[:, None] + reached[:, None] * (own[None] - prefill[:, None])
        return cost

    def _legal(self, prefixes: _Prefixes) -> NDArray[np.bool_]:
        """(P, R) whether a row may follow: its prefill is no shallower, and it is another adapter that can go on."""
        layers = np.array([one.stage.prefill_layers for one in self.scores])
        usable = np.array([one.can_go_on for one in self.scores])
        legal = np.ones((len(prefixes.last), len(self.adapter)), dtype=bool)
        reached = prefixes.unsure.mean(axis=1)
        for at, system in enumerate(prefixes.systems):
            if not system:
                continue
            if reached[at] < MIN_SHARE:
                legal[at] = False
                continue
            used = set(self.adapter[list(system)].tolist())
            fits = usable & (layers >= layers[prefixes.last[at]])
            fits[list(used)] = False
            legal[at] = fits[self.adapter]
        return legal

    def _per_row(self, values: Sequence[float]) -> Floats:
        return np.array(values)[self.adapter]

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
        return Candidate(tuple(stages), correct, cost)


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
