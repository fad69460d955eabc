"""The choice among candidates by Pareto Testing: it keeps its promise with the nominal probability, and is the cheapest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from revmux import UserError
from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.choose import BUDGET, Choice, choose, outcome_of, safest_first, verify, worst_outcome
from revmux.plan.config import Goal
from revmux.plan.interval import Floats, loss_bound


def candidate(name: str, correct: Any, cost: float, num_inputs: int = 2, **settings: Any) -> Candidate:
    method = "exit-head" if num_inputs == 1 else "revmux"
    stage = PlannedStage(name, method, num_inputs, 1, folder=name)
    correct = np.asarray(correct, dtype=float)
    return Candidate((stage,), correct, cost, **{"expected_bound": 1 - correct.mean(), **settings})


def ladder(name: str, correct: Any, cost: float) -> Candidate:
    stages = tuple(PlannedStage(f"{name}{number}", "exit-head", 1, number, 0.9, 0.1) for number in (1, 2))
    correct = np.asarray(correct, dtype=float)
    return Candidate(stages, correct, cost, expected_bound=1 - correct.mean())


def same_again(one: Candidate) -> Floats:
    """In the test, a system answers as in the search."""
    return one.correct


def pick(siso: Floats, made: list[Candidate], goal: Goal, answer: Callable[[Candidate], Floats] = same_again) -> Choice:
    return choose(siso, siso, safest_first(made), answer, goal)


def names(choice: Choice) -> list[str]:
    return [one.candidate.name for one in choice.widths]


def losing(points: float, inputs: int = 2000) -> Floats:
    """A system that loses the given number of points against a SISO that is always right."""
    correct = np.ones(inputs)
    correct[: round(points * inputs / 100)] = 0.0
    return correct


def test_the_sequence_is_the_front_from_the_safest_to_the_cheapest() -> None:
    made = [
        candidate("cheap", losing(5), 0.3),
        candidate("safe", losing(0), 0.9),
        candidate("beaten", losing(6), 0.8),
        candidate("middle", losing(1), 0.6),
        candidate("hardly-cheaper", losing(1.2), 0.595),
        candidate("dearer-than-siso", losing(-0.0), 1.2),
    ]
    assert [one.name for one in safest_first(made)] == ["safe", "middle", "cheap"]
    assert safest_first([]) == []
    ends = [candidate("safe", losing(0), 0.5), candidate("cheapest", losing(0.1), 0.495)]
    assert [one.name for one in safest_first(ends)] == ["safe", "cheapest"], "the cheapest of all is always tested"


def test_the_cheapest_accepted_system_is_chosen_and_a_late_refusal_ends_the_tests() -> None:
    asked = []

    def answer(one: Candidate) -> Floats:
        asked.append(one.name)
        return one.correct

    made = [candidate(f"lost{points}", losing(points), 0.9 - points / 10) for points in (0, 1, 2, 3, 4, 5)]
    choice = pick(np.ones(2000), made, Goal(allowance=3.4), answer)
    assert asked == ["lost0", "lost1", "lost2", "lost3"], "the budget of the first tests is spent"
    assert choice.chosen is not None
    assert choice.chosen.candidate.name == "lost2"
    assert choice.chosen.loss == pytest.approx(2.0)
    assert choice.chosen.bound == pytest.approx(loss_bound(1 - losing(2), 0.95)), "nothing was refused before"
    judged = {one.candidate.name: (one.fits, one.bound is None) for one in choice.judged}
    assert judged["lost3"] == (False, False), "tested and not accepted"
    assert judged["lost4"] == judged["lost5"] == (False, True), "not tested"
    assert choice.siso.fits


def test_the_test_decides_whatever_the_search_says() -> None:
    lucky = candidate("lucky", losing(0), 0.4)
    choice = pick(np.ones(2000), [lucky], Goal(allowance=1.0), lambda _: losing(3))
    assert choice.chosen is not None
    assert choice.chosen.candidate.is_plain
    refused = next(one for one in choice.judged if one.candidate.name == "lucky")
    assert (refused.search_loss, refused.loss, refused.fits) == (0.0, 3.0, False)


def test_a_narrow_system_is_served_beside_a_cheaper_wide_one() -> None:
    siso = np.ones(2000)
    made = [
        candidate("two", losing(0.05), 0.7, 2),
        candidate("eight", losing(0.2), 0.4, 8),
        candidate("sixteen-bad", losing(10), 0.2, 16),
        candidate("head", losing(0.1), 0.5, 1),
    ]
    choice = pick(siso, made, Goal(allowance=1.0))
    assert names(choice) == ["head", "eight"]
    assert choice.chosen is choice.widths[-1]
    assert names(pick(siso, made[:-1], Goal(allowance=1.0))) == ["two", "eight"]


def test_a_ladder_is_served_alone() -> None:
    made = [candidate("head", losing(0), 0.5, 1), ladder("stairs", losing(0.1), 0.3)]
    choice = pick(np.ones(2000), made, Goal(allowance=1.0))
    assert names(choice) == ["stairs1@0.9+stairs2@0.9"]


def test_siso_is_the_safe_end() -> None:
    siso = np.ones(2000)
    assert names(pick(siso, [candidate("wide", losing(20), 0.3, 4)], Goal(allowance=1.0))) == ["siso"]
    assert names(pick(siso, [], Goal(allowance=0.0))) == ["siso"]


def test_a_throughput_goal_selects_the_safest_system_among_the_fast_ones() -> None:
    made = [candidate("fast", losing(10), 0.3, 8), candidate("good", losing(5), 0.5, 4)]
    choice = pick(np.ones(2000), made, Goal(throughput=1.8))
    assert choice.chosen is not None
    assert choice.chosen.candidate.name == "good"
    assert choice.chosen.bound is not None
    assert names(pick(np.ones(2000), made, Goal(throughput=0.9))) == ["siso"]


def test_an_unmet_goal_is_reported_with_the_gap_and_the_nearest_system() -> None:
    siso = np.ones(2000)
    made = [candidate("fast", losing(10), 0.4, 8), candidate("good", losing(0), 0.8, 2)]
    both = pick(siso, made, Goal(allowance=2.0, throughput=2.0))
    assert both.chosen is None
    assert both.nearest is not None
    assert both.nearest.bound is not None
    assert (both.nearest.candidate.name, both.shortfall_unit) == ("fast", "points")
    assert both.shortfall == pytest.approx(both.nearest.bound - 2.0)
    speed = pick(siso, made, Goal(throughput=3.0))
    assert speed.nearest is not None
    assert (speed.nearest.candidate.name, speed.shortfall_unit) == ("fast", "times")
    assert speed.shortfall == pytest.approx(0.5)
    safe = pick(siso, made, Goal(allowance=2.0, throughput=3.0))
    assert safe.nearest is not None
    assert safe.nearest.candidate.name == "good"
    assert safe.shortfall == pytest.approx(3.0 - 1 / 0.8)


def two_draws(random: np.random.Generator, systems: int, inputs: int, lost: Floats) -> tuple[Floats, Floats]:
    """SISO's answers (2, M) and those of K systems (K, 2, M) whose true losses are given, in search and test."""
    siso = (random.random((2, inputs)) < 0.9).astype(float)
    drop = random.random((systems, 2, inputs)) < (lost[:, None, None] / 100 + 0.014) / 0.9
    won = random.random((systems, 2, inputs)) < 0.14  # of SISO's errors: 1.4 points
    return siso, np.where(siso == 1, ~drop, won).astype(float)


def front_then_bound(siso: Floats, correct: Floats, cost: Floats, allowance: float) -> int | None:
    """Prune to the front by accuracy and bound its systems on the same inputs: the procedure that fails."""
    best, chosen = -1.0, None
    for index in np.argsort(cost):
        accuracy = correct[index].mean()
        if accuracy <= best:
            continue
        best = accuracy
        if chosen is None and loss_bound(siso - correct[index], 0.95) <= allowance:
            chosen = int(index)
    return chosen


def test_the_chosen_of_sixty_systems_exceeds_the_allowance_with_at_most_the_nominal_probability() -> None:
    """Sixty systems, all of which truly lose a little more than allowed; choosing any of them is a failure."""
    random = np.random.default_rng(11)
    worlds, systems, inputs, allowance = 100, 60, 1000, 4.0
    failed = failed_before = 0
    for world in range(worlds):
        lost = allowance + random.uniform(0.02, 0.3, systems)
        cost = random.uniform(0.2, 0.9, systems)
        siso, correct = two_draws(random, systems, inputs, lost)
        made = [candidate(f"s{index}", correct[index, 0], float(cost[index])) for index in range(systems)]
        second = {f"s{index}": correct[index, 1] for index in range(systems)}
        choice = choose(siso[0], siso[1], safest_first(made), lambda one, by=second: by[one.name], Goal(allowance))
        assert choice.chosen is not None
        failed += not choice.chosen.candidate.is_plain
        failed_before += world < 40 and front_then_bound(siso[0], correct[:, 0], cost, allowance) is not None
    error = math.sqrt(0.05 * 0.95 / worlds)
    assert failed / worlds < 0.05 + 2 * error
    assert failed_before / 40 > 0.2, "one bound per system of the front, on the inputs that chose it, is too weak"


def test_systems_that_are_safe_are_found_among_those_that_are_not() -> None:
    random = np.random.default_rng(12)
    worlds, allowance, failed, cheap = 25, 3.0, 0, 0
    for _ in range(worlds):
        cost = np.linspace(0.25, 0.95, 60)
        lost = 6.0 * (0.95 - cost)  # from 4.2 points at 0.25 to none; 0.45 is the cheapest that is allowed
        siso, correct = two_draws(random, 60, 2000, lost)
        made = [candidate(f"s{index}", correct[index, 0], float(cost[index])) for index in range(60)]
        second = {f"s{index}": correct[index, 1] for index in range(60)}
        choice = choose(siso[0], siso[1], safest_first(made), lambda one, by=second: by[one.name], Goal(allowance))
        assert choice.chosen is not None
        failed += choice.chosen.candidate.cost < 0.45
        cheap += choice.chosen.candidate.cost < 0.75
    assert failed <= 0.1 * worlds
    assert cheap > 0.8 * worlds


def test_one_unlucky_candidate_does_not_end_the_search() -> None:
    """The next tests have a share of the error probability of their own, and an accepted system passes its share on."""
    made = [candidate(f"s{number}", losing(number / 10), 0.9 - number / 10) for number in range(6)]
    unlucky = {"s0": losing(5)}
    choice = pick(np.ones(2000), made, Goal(allowance=1.2), lambda one: unlucky.get(one.name, one.correct))
    assert names(choice) == ["s5"]
    bounds = {one.candidate.name: one.bound for one in choice.judged}
    lost = {f"s{number}": losing(number / 10) for number in range(6)}
    assert bounds["s1"] == pytest.approx(loss_bound(1 - lost["s1"], 1 - 0.05 * BUDGET[1]))
    rest = 1 - 0.05 * (BUDGET[1] + BUDGET[2])
    assert [bounds[name] for name in ("s2", "s5")] == pytest.approx(
        [loss_bound(1 - lost[name], rest) for name in ("s2", "s5")]
    )
    assert sum(BUDGET) == pytest.approx(1.0)
    bad = {f"s{number}": losing(5) for number in range(len(BUDGET))}
    ended = pick(np.ones(2000), made, Goal(allowance=1.2), lambda one: bad.get(one.name, one.correct))
    assert names(ended) == ["siso"]
    assert sum(one.bound is not None for one in ended.judged) == 1 + len(BUDGET), (
        "SISO, and nothing is left after these"
    )


def test_few_inputs_without_a_difference_give_a_wide_bound() -> None:
    assert loss_bound(np.zeros(30), 0.95) > 3.0
    assert loss_bound(np.zeros(3000), 0.95) < 0.15


@pytest.mark.parametrize(("inputs", "lost", "won"), [(60, 0.09, 0.04), (300, 0.03, 0.01), (1000, 0.008, 0.004)])
def test_the_bound_holds_at_small_samples_with_the_nominal_probability(inputs: int, lost: float, won: float) -> None:
    """The exact probability that the bound is below the true loss, over all outcomes."""
    most = [int(stats.binom.ppf(1 - 1e-6, inputs, share)) for share in (lost, won)]
    missed = 0.0
    for first in range(most[0] + 1):
        chance = stats.binom.pmf(first, inputs, lost) * stats.binom.pmf(
            np.arange(most[1] + 1), inputs - first, won / (1 - lost)
        )
        # More inputs won lower the bound, so the outcomes whose bound is too low are the last ones.
        low, high = 0, most[1] + 1
        while low < high:
            middle = (low + high) // 2
            if loss_bound(outcome(inputs, first, middle), 0.95) < 100 * (lost - won):
                high = middle
            else:
                low = middle + 1
        missed += chance[low:].sum()
    assert missed <= 0.05
    assert missed >= 0.02, "and it is not much wider than necessary"


def outcome(inputs: int, lost: int, won: int) -> Floats:
    return np.r_[np.ones(lost), -np.ones(won), np.zeros(inputs - lost - won)]


def test_answers_over_several_groupings_count_as_more_inputs() -> None:
    """Five groupings, of which one or two change an answer: less noise than one grouping with as many changes."""
    random = np.random.default_rng(3)
    several = (random.random((5, 3000)) < 0.02).mean(axis=0) - (random.random((5, 3000)) < 0.02).mean(axis=0)
    single = outcome(3000, round(several.clip(min=0).sum()), round((-several).clip(min=0).sum()))
    assert several.mean() < loss_bound(several, 0.95) / 100 < several.mean() + 0.6 * loss_bound(single, 0.95) / 100


def test_the_verification_interval_has_a_bound_on_each_side() -> None:
    siso = np.r_[np.ones(90), np.zeros(10)]
    correct = np.r_[np.zeros(6), np.ones(84), np.ones(2), np.zeros(8)]
    found = verify(siso, correct, Goal(allowance=4.0, confidence=0.9))
    assert found.loss == pytest.approx(4.0)
    assert found.upper == loss_bound(siso - correct, 0.95)
    assert found.lower == -loss_bound(correct - siso, 0.95)
    assert found.lower < -0.4 < 8.0 < found.upper
    assert (found.outcome, found.inputs) == ("not proven", 100)
    assert verify(siso, correct, Goal(allowance=3.9)).outcome == "exceeded"
    assert verify(siso, correct, Goal(allowance=30.0)).outcome == "proven"


def test_an_outcome_has_one_of_three_words() -> None:
    assert outcome_of(loss=0.4, upper=0.9, allowance=1.0) == "proven"
    assert outcome_of(loss=0.4, upper=1.1, allowance=1.0) == "not proven"
    assert outcome_of(loss=1.01, upper=2.0, allowance=1.0) == "exceeded"
    assert outcome_of(loss=9.0, upper=9.9, allowance=None) == "proven"
    assert worst_outcome(["proven", "exceeded", "not proven"]) == "exceeded"
    assert worst_outcome(["proven", "not proven"]) == "not proven"


def test_siso_loses_nothing_against_itself() -> None:
    found = verify(np.ones(10), None, Goal(allowance=0.0))
    assert (found.loss, found.lower, found.upper, found.outcome) == (0.0, 0.0, 0.0, "proven")


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


def test_systems_must_have_the_same_inputs_and_distinct_names() -> None:
    siso = np.ones(10)
    with pytest.raises(UserError, match="two answered 9 inputs, but SISO 10"):
        choose(siso, siso, [candidate("two", siso, 0.5)], lambda _: np.ones(9), Goal(allowance=1.0))
    twice = [candidate("two", siso, 0.5), candidate("two", siso, 0.6)]
    with pytest.raises(UserError, match="share a name"):
        choose(siso, siso, twice, same_again, Goal(allowance=1.0))
