"""The choice among candidates: optimal by brute force, with valid confidence bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from revmux import UserError
from revmux.plan.choose import Candidate, Choice, Judged, choose, loss_bounds, verify
from revmux.plan.config import Goal


def candidate(name: str, correct: Any, cost: float, num_inputs: int = 2, **settings: Any) -> Candidate:
    method = "exit-head" if num_inputs == 1 else "revmux"
    return Candidate(name, method, num_inputs, 1, np.asarray(correct, dtype=float), cost, **settings)


def draw(random: np.random.Generator, inputs: int, systems: int) -> tuple[np.ndarray, list[Candidate]]:
    """SISO's answers, and systems with losses from zero to large and often equal costs."""
    siso = (random.random(inputs) < 0.85).astype(float)
    made = []
    for index in range(systems):
        correct = siso.copy()
        wrong = random.random(inputs) < random.choice([0.0, 0.003, 0.02, 0.08])
        correct[wrong] = random.choice([0.0, 0.5, 1.0])
        width = int(random.choice([1, 2, 4, 8]))
        cost = float(random.choice([0.25, 0.4, 0.55, 0.7, 0.85]))
        made.append(candidate(f"system{index}", correct, cost, width, throughput_ratio=1 / cost if index % 2 else None))
    return siso, made


def names(choice: Choice) -> list[str]:
    return [one.candidate.name for one in choice.widths]


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_optimal_by_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    siso, made = draw(random, 600, 14)
    goal = Goal(allowance=float(random.choice([0.0, 1.5, 3.0, 8.0])), throughput=[None, 1.3][seed % 2])
    choice = choose(siso, made, goal)
    assert {one.candidate.name for one in choice.judged} == {"siso", *(one.name for one in made)}

    def meets(one: Judged) -> bool:
        return one.bound <= goal.allowance and 1 / one.candidate.cost >= (goal.throughput or 0)  # type: ignore[operator]

    feasible = [one for one in choice.judged if meets(one)]
    if not feasible:
        assert choice.chosen is None
        return
    assert choice.chosen is not None
    assert meets(choice.chosen)
    assert choice.chosen.candidate.cost == min(one.candidate.cost for one in feasible)
    for one in choice.widths:
        rivals = [
            other
            for other in choice.judged
            if other.candidate.num_inputs == one.candidate.num_inputs
            and other.bound <= goal.allowance  # type: ignore[operator]
            and (other.candidate.method != "siso" or other is choice.chosen)
        ]
        assert one.candidate.cost == min(other.candidate.cost for other in rivals)
    costs = [one.candidate.cost for one in choice.widths]
    assert costs == sorted(costs, reverse=True)
    assert choice == choose(siso, made[::-1], goal) or names(choice) == names(choose(siso, made[::-1], goal))


def test_wide_groups_are_served_beside_more_expensive_narrow_ones() -> None:
    siso = np.ones(2000)
    slightly = siso.copy()
    slightly[:4] = 0.0
    made = [
        candidate("two", siso, 0.7, 2),
        candidate("four-expensive", siso, 0.75, 4),
        candidate("eight", slightly, 0.4, 8),
        candidate("sixteen-bad", siso * 0.9, 0.2, 16),
        candidate("head", slightly, 0.5, 1),
    ]
    choice = choose(siso, made, Goal(allowance=1.0))
    assert names(choice) == ["head", "eight"]
    assert choice.chosen is choice.widths[-1]
    assert names(choose(siso, made[:-1], Goal(allowance=1.0))) == ["two", "eight"]
    expensive = candidate("head", slightly, 0.9, 1)
    assert names(choose(siso, [*made[:-1], expensive], Goal(allowance=1.0))) == ["head", "two", "eight"]


def test_an_exit_head_or_siso_is_chosen_if_it_is_better() -> None:
    siso = np.ones(2000)
    head = candidate("head", siso, 0.5, 1)
    bad = candidate("wide", siso * 0.8, 0.3, 4)
    assert names(choose(siso, [head, bad], Goal(allowance=1.0))) == ["head"]
    assert names(choose(siso, [bad], Goal(allowance=1.0))) == ["siso"]
    assert names(choose(siso, [], Goal(allowance=0.0))) == ["siso"]


def test_a_fallback_threshold_is_a_candidate_like_any_other() -> None:
    siso = np.ones(2000)
    plain = candidate("n4", np.r_[np.zeros(100), np.ones(1900)], 0.4, 4)
    sure = candidate("n4@0.9", siso, 0.5, 4, threshold=0.9, fallback=0.2)
    choice = choose(siso, [plain, sure], Goal(allowance=1.0))
    assert names(choice) == ["n4@0.9"]
    assert choice.chosen is not None
    assert choice.chosen.candidate.threshold == 0.9


def test_a_throughput_goal_selects_the_system_with_the_least_loss_among_the_fast_ones() -> None:
    siso = np.ones(1000)
    made = [candidate("fast", siso * 0.9, 0.3, 8), candidate("good", siso * 0.95, 0.5, 4)]
    choice = choose(siso, made, Goal(throughput=1.8))
    assert choice.chosen is not None
    assert choice.chosen.candidate.name == "good"


def test_an_unmet_goal_is_reported_with_the_gap_and_the_nearest_system() -> None:
    siso = np.ones(1000)
    made = [candidate("fast", siso * 0.9, 0.4, 8), candidate("good", siso, 0.8, 2)]
    both = choose(siso, made, Goal(allowance=2.0, throughput=2.0))
    assert both.chosen is None
    assert both.nearest is not None
    assert (both.nearest.candidate.name, both.shortfall_unit) == ("fast", "points")
    assert both.shortfall == pytest.approx(both.nearest.bound - 2.0)
    speed = choose(siso, made, Goal(throughput=3.0))
    assert speed.nearest is not None
    assert (speed.nearest.candidate.name, speed.shortfall_unit) == ("fast", "times")
    assert speed.shortfall == pytest.approx(0.5)


@pytest.mark.parametrize("inputs", [200, 1000])
def test_bounds_hold_for_all_systems_at_once(inputs: int) -> None:
    """30 systems with a true loss of 4 points: the luckiest one is within its bound in 95 % of the simulations."""
    random = np.random.default_rng(7)
    worlds, held, held_alone = 200, 0, 0
    for _ in range(worlds):
        siso = (random.random(inputs) < 0.9).astype(float)
        lost = random.random((30, inputs)) < 0.06
        won = random.random((30, inputs)) < 0.14  # of SISO's errors: 1.4 points won, 5.4 lost
        correct = np.where(siso == 1, ~lost, won).astype(float)
        losses, bounds = loss_bounds(siso, correct, 0.95)
        held += bool((bounds >= 4.0).all())
        error = 100 * (siso - correct).std(axis=1, ddof=1) / math.sqrt(inputs)
        held_alone += bool((losses + stats.norm.ppf(0.95) * error >= 4.0).all())
    assert held / worlds > 0.92
    assert held_alone / worlds < 0.7  # one bound per system, as if only one had been tried, is too weak


def test_few_inputs_without_a_difference_give_a_wide_bound() -> None:
    siso = np.ones(30)
    losses, bounds = loss_bounds(siso, siso[None], 0.95)
    assert losses[0] == 0.0
    assert bounds[0] > 3.0
    assert loss_bounds(np.ones(3000), np.ones((1, 3000)), 0.95)[1][0] < 0.1


def test_the_verification_interval_equals_the_one_computed_by_hand() -> None:
    """100 inputs, 6 lost and 2 won: Wilson's limits of both shares, combined."""
    siso = np.r_[np.ones(90), np.zeros(10)]
    correct = np.r_[np.zeros(6), np.ones(84), np.ones(2), np.zeros(8)]
    found = verify(siso, correct, Goal(allowance=4.0, confidence=0.9))
    level = 2 * stats.norm.cdf(stats.t.ppf(0.95, 99)) - 1
    lost = stats.binomtest(6, 100).proportion_ci(level, method="wilson")
    won = stats.binomtest(2, 100).proportion_ci(level, method="wilson")
    assert found.loss == pytest.approx(4.0)
    assert found.lower == pytest.approx(4 - 100 * math.hypot(0.06 - lost.low, won.high - 0.02))
    assert found.upper == pytest.approx(4 + 100 * math.hypot(lost.high - 0.06, 0.02 - won.low))
    assert (found.held, found.proven, found.inputs) == (True, False, 100)
    assert not verify(siso, correct, Goal(allowance=3.9)).held


def test_siso_loses_nothing_against_itself() -> None:
    found = verify(np.ones(10), None, Goal(allowance=0.0))
    assert (found.loss, found.lower, found.upper, found.held, found.proven) == (0.0, 0.0, 0.0, True, True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "neither allowance nor throughput"),
        ({"allowance": -0.5}, "allowance is -0.5"),
        ({"allowance": math.nan}, "allowance is nan"),
        ({"throughput": 0.0}, "throughput is 0.0"),
        ({"allowance": 1.0, "confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_invalid_goals_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Goal(**settings)


def test_candidates_must_have_the_same_inputs_and_distinct_names() -> None:
    siso = np.ones(10)
    with pytest.raises(UserError, match="two answered 9 inputs, but SISO 10"):
        choose(siso, [candidate("two", np.ones(9), 0.5)], Goal(allowance=1.0))
    with pytest.raises(UserError, match="share a name"):
        choose(siso, [candidate("two", siso, 0.5), candidate("two", siso, 0.6)], Goal(allowance=1.0))
