"""The search for the front of single adapters and ladders: equal to brute force, and fast."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from revmux.deferral import Deferral
from revmux.plan.candidate import PlannedStage
from revmux.plan.interval import expected_bound
from revmux.plan.search import Found, StageScores, search


def adapter(
    random: np.random.Generator,
    name: str,
    inputs: int,
    layers: int,
    width: int = 1,
    shuffles: int = 1,
    can_go_on: bool = True,
) -> StageScores:
    """An adapter of a model with ten layers that is right more often where it is sure."""
    sure = random.random((shuffles, inputs)).astype(np.float32)
    correct = random.random((shuffles, inputs)) < 0.3 + 0.06 * layers * sure
    method = "exit-head" if width == 1 else "revmux"
    prefill = layers / 10
    cost = prefill if width == 1 else prefill + (1 - prefill) / width
    stage = PlannedStage(name, method, width, layers, folder=name)
    return StageScores(stage, correct, sure, cost, prefill, 1 - prefill, can_go_on)


def by_hand(system: list[tuple[StageScores, float]], siso: np.ndarray) -> tuple[np.ndarray, float]:
    """What a ladder answers and costs, input by input and grouping by grouping."""
    shuffles = max(len(one.correct) for one, _ in system)
    correct, cost = np.zeros((shuffles, len(siso))), 0.0
    for shuffle, row in itertools.product(range(shuffles), range(len(siso))):
        paid = 0.0
        for one, threshold in system:
            own = shuffle if len(one.correct) > 1 else 0
            cost += one.cost - paid
            paid = one.prefill_cost
            if not one.confidence[own, row] < threshold:
                correct[shuffle, row] = one.correct[own, row]
                break
        else:
            cost += system[-1][0].resume_cost
            correct[shuffle, row] = siso[row]
    return correct, cost / correct.size


def test_every_system_of_two_stages_is_compared_as_if_it_had_run() -> None:
    random = np.random.default_rng(0)
    siso = (random.random(60) < 0.9).astype(float)
    pool = [adapter(random, "a", 60, 2), adapter(random, "b", 60, 4, 2, shuffles=3), adapter(random, "c", 60, 4, 4, 3)]
    limits = [0.0, 0.3, 0.6]
    found = search(pool, siso, limits, max_stages=2)
    systems = [[(one, limit)] for one in pool for limit in limits]
    for first, second in itertools.permutations(pool, 2):
        if second.stage.prefill_layers >= first.stage.prefill_layers:
            systems += [[(first, one), (second, two)] for one in limits[1:] for two in limits]
    assert found.compared == len(systems) + 1
    made = []
    for system in systems:
        correct, cost = by_hand(system, siso)
        lost = siso - correct
        bound = float(expected_bound(lost.mean(), np.abs(lost).mean(), 60, 60, 0.95))
        made.append((round(cost, 6), round(bound, 6), correct.mean(axis=0)))
    best: list[tuple[float, float, np.ndarray]] = []
    for one in sorted(made, key=lambda one: one[:2]):
        if not best or one[1] < best[-1][1]:
            best.append(one)
    assert [one.cost for one in found.front] == pytest.approx([cost for cost, _, _ in best], abs=1e-5)
    for one, (_, _, correct) in zip(found.front, best):
        np.testing.assert_allclose(one.correct, correct, atol=1e-6)
        differing = np.square(siso - correct).mean()
        bound = expected_bound((siso - correct).mean(), differing, 60, 60, 0.95)
        assert one.expected_bound == pytest.approx(bound, abs=1e-4)
    assert [one.name for one in found.alone] == ["a", "b", "c"]


def test_a_third_stage_extends_the_front_and_shares_fall_from_stage_to_stage() -> None:
    random = np.random.default_rng(1)
    siso = np.ones(400)
    pool = [adapter(random, f"layer{layer}", 400, layer) for layer in (1, 3, 5, 7)]
    found = search(pool, siso)
    assert max(len(one.stages) for one in found.front) == 3
    for one in found.front:
        layers = [stage.prefill_layers for stage in one.stages]
        assert layers == sorted(layers)
        shares = [stage.going_on for stage in one.stages]
        assert all(share >= 0.02 for share in shares[:-1]), "no stage for hardly any inputs"
        assert shares == sorted(shares, reverse=True)
        assert all(stage.threshold is not None for stage in one.stages[:-1])
    shorter = search(pool, siso, max_stages=2)

    def best_at(result: Found, cost: float) -> float:
        return min((one.expected_bound for one in result.front if one.cost <= cost), default=np.inf)

    for cost in (0.3, 0.4, 0.5, 0.6):
        assert best_at(found, cost) <= best_at(shorter, cost) <= best_at(search(pool, siso, max_stages=1), cost)


def test_a_method_that_cannot_go_on_is_a_system_of_its_own_only() -> None:
    random = np.random.default_rng(2)
    siso = np.ones(100)
    pool = [adapter(random, "slots", 100, 5, 2, can_go_on=False), adapter(random, "head", 100, 2)]
    found = search(pool, siso, [0.5])
    assert found.compared == 1 + 3  # SISO, each alone, and the head with its fallback
    assert all(not one.is_ladder for one in found.front)


def test_thresholds_are_chosen_from_the_confidences() -> None:
    random = np.random.default_rng(3)
    one = adapter(random, "head", 2000, 3)
    siso = np.ones(2000)
    steps = [found.first.threshold for found in search([one], siso, max_stages=1).front]
    assert len(steps) > 8
    assert all(step is None or 0 < step < 1 for step in steps)


def test_a_learned_confidence_is_used_after_the_stages_that_it_was_learned_for() -> None:
    """Confidences that know every wrong answer: as a first stage alone, or only after the stage ``a``."""
    random = np.random.default_rng(5)
    siso = np.ones(400)
    pool = [adapter(random, name, 400, layer) for name, layer in (("a", 2), ("b", 3), ("c", 6))]
    deferral = Deferral((1.0,), 0.0)

    def knowing(one: StageScores, *follows: str) -> StageScores:
        stage = replace(one.stage, deferral=deferral)
        return replace(one, stage=stage, confidence=one.correct.astype(np.float32), follows=follows)

    first = search([*pool, knowing(pool[0])], siso, [0.5])
    learned = [one for one in first.front if any(stage.deferral for stage in one.stages)]
    assert learned
    assert all(
        [bool(stage.deferral) for stage in one.stages] == [True, *[False] * (len(one.stages) - 1)] for one in learned
    )
    assert [one.name for one in first.alone] == ["a", "b", "c"]
    later = search([*pool, knowing(pool[2], "a")], siso, [0.5])
    learned = [one for one in later.front if any(stage.deferral for stage in one.stages)]
    assert learned
    assert all([stage.adapter for stage in one.stages[:2]] == ["a", "c"] and one.stages[1].deferral for one in learned)
    assert all("~" in one.name and "learned confidence is below" in one.describe() for one in learned)


def test_an_empty_pool_has_no_front() -> None:
    found = search([], np.ones(10))
    assert (found.front, found.alone, found.compared) == ([], [], 1)


@pytest.mark.parametrize("adapters", [30])
def test_hundreds_of_thousands_of_ladders_take_seconds(adapters: int) -> None:
    random = np.random.default_rng(4)
    pool = [
        adapter(random, f"one{index}", 1500, 1 + index % 9, (1, 2, 4)[index % 3], 3 if index % 3 else 1)
        for index in range(adapters)
    ]
    started = time.perf_counter()
    found = search(pool, np.ones(1500))
    assert found.compared > 100_000
    assert time.perf_counter() - started < 60
