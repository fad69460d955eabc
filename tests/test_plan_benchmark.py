"""The plan benchmark: all allowances choose from the same adapters, and all sides of the sweep do the same work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plan import allowances, sweep
from benchmarks.plan.page import plan_words
from benchmarks.plan.tasks import Budget, Planned, plan_task
from benchmarks.rows import unmeasured_row, verdict
from ray_jobs.sweep.config import TuneJob
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.choose import choose, verify
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.plan.plan import Plan, Served
from revmux.pretrained.config import BackboneConfig
from revmux.training.recipe import prepare, train_here

BUDGET = Budget(max_length=16, frozen_layers=1, tuning_epochs=1, epochs=1, exit_layers=(1, 2), prefill_layers=(1,))
COUNTED = MeasureConfig(shuffles=2, throughput_inputs=0, thresholds=(0.6,))


@pytest.fixture(scope="module")
def planned(tiny_model_folder: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    source = BackboneConfig(str(tiny_model_folder), max_length=16)
    kept = tmp_path_factory.mktemp("kept")
    return plan_task("tiny", DataConfig(source=str(tiny_csv)), SplitConfig(share=0.5), BUDGET, kept, source)


def test_allowances_are_choices_among_the_same_adapters(planned: Planned) -> None:
    found = allowances.measure(planned, COUNTED, (0.5, 100.0))
    strict, generous = found["rows"]
    assert len(list((planned.folder / "adapters").iterdir())) == len(planned.recipes) == 3
    # On so few inputs no system is surely within half a point, and all are within 100 points.
    assert (strict["method"], strict["verified_loss"], strict["ratio_median"], verdict(strict)) == ("siso", 0, 0, "met")
    assert "ships the plain model" in strict["outcome"]
    assert generous["method"] != "siso"
    assert generous["cost_counted"] < strict["cost_counted"] == 1
    assert generous["ratio_median"] == pytest.approx(generous["verified_loss"] / 100, abs=1e-3)
    assert generous["verified_loss"] == pytest.approx(100 * (generous["siso_accuracy"] - generous["accuracy_mean"]))
    assert generous["verified_inputs"] == len(planned.task.test)
    assert generous["choosing_inputs"] == len(planned.choosing.test) == found["task"]["choosing"]

    rounds = [
        {
            side: {"seconds": seconds, "trials": {"done": 10 - stopped, "stopped": stopped}}
            for side, seconds, stopped in (("sweep", 20, 6), ("whole", 40, 0), ("online", online, 0), ("stored", 35, 0))
        }
        for online in (60.0, 80.0)
    ]
    timed = sweep.rows_of(rounds, "quick")
    assert [row["ratio_median"] for row in timed] == [3.5, 1.75, 2.0]
    meta = {"data": {"tiny": found["task"]}, "machine": {"cores": 2}, "versions": {"torch": "2"}, "commit": None}
    rows = [
        *found["rows"],
        *timed,
        unmeasured_row(allowances.ratio_name(1.0, "SST-2"), "no GLUE folder was named", 1.0),
    ]
    words = plan_words({"meta": meta, "rows": rows})["plan"]
    assert "| tiny | 0.5 | siso | 1 | – | 0.00, 0.00 | 0.00 (0.00 to 0.00) |" in words
    assert "| 10 (6, 6) | ≥ 3 | 3.50 (3.00–4.00); sweep 20 s, whole 40 s, online 70 s, stored 35 s | met |" in words
    assert "| – | – | – | not measured: no GLUE folder was named |" in words


def test_a_plan_that_fails_verification_ships_nothing(tmp_path: Path) -> None:
    siso = np.ones(200)
    system = Candidate((PlannedStage("revmux-n2", "revmux", 2, 1, folder="adapter"),), siso, cost_counted=0.7)
    choice = choose(siso, siso, [system], lambda one: one.correct, Goal(3.0))
    assert choice.chosen is not None
    assert choice.chosen.candidate.name == "revmux-n2"
    kept = verify(siso, siso, choice.goal)
    broken = verify(siso, np.where(np.arange(200) < 10, 0.0, 1.0), choice.goal)
    plans = [Plan(choice, [Served(choice.chosen, seen, ("adapter",))], [], tmp_path) for seen in (kept, broken)]
    assert allowances.outcome(plans[0]).startswith("ships multiplexing: revmux with N = 2")
    assert allowances.outcome(plans[1]).startswith("ships nothing: the allowance was exceeded")


@pytest.mark.parametrize("index", [0, 2])
def test_trials_with_and_without_the_store_give_the_same_result(planned: Planned, tmp_path: Path, index: int) -> None:
    recipe = replace(planned.recipes[index], store=StoreConfig(root=str(tmp_path), dtype="float32"), shuffles=2)
    stored, online = train_here(prepare(recipe, planned.choosing)), sweep.train_online(recipe, planned.choosing)
    assert online == stored


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_every_side_of_a_round_trains_every_trial(planned: Planned, tiny_csv: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "{methods: [revmux, exit-head], num_inputs: [2], prefill_layers: [1], exit_layers: [2], epochs: 1}"
    )
    task = load_task(DataConfig(source=str(tiny_csv)))
    assert task.label_names == planned.task.label_names
    found = sweep.one_round(TuneJob(planned.recipes[0].backbone, DataConfig(source=str(tiny_csv)), str(space)))
    assert found.keys() == sweep.SIDES.keys()
    for side in ("whole", "online", "stored"):
        assert found[side]["trials"] == {"done": 2}
    assert all(one["seconds"] > 0 for one in found.values())
