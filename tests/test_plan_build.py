"""The plan on one machine without Ray: train, choose, verify and write."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from revmux import UserError
from revmux.adapters.config import load_adapter_config
from revmux.adapters.folder import load_adapter
from revmux.bulk.config import BulkConfig
from revmux.bulk.system import adapter_sources
from revmux.data.config import DataConfig
from revmux.data.task import TaskData, load_task
from revmux.estimate.throughput import Ratio
from revmux.fallback import confidence
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.ladder import Ladder, Stage
from revmux.plan import measure
from revmux.plan.build import for_choosing, plan_here, train_recipes
from revmux.plan.candidate import Candidate
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.plan.files import PLAN_VERSION, write_stages
from revmux.plan.measure import Bench, divide
from revmux.plan.plan import Plan
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine, Limits
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.ladder_evaluation import evaluate_ladder

pytestmark = pytest.mark.numeric

COUNTED = MeasureConfig(shuffles=2, throughput_inputs=0, thresholds=(0.6,))


@pytest.fixture(scope="module")
def task(tiny_csv: Path) -> TaskData:
    return load_task(DataConfig(source=str(tiny_csv)))


@pytest.fixture(scope="module")
def recipes(tiny_model_folder: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    base = Recipe(
        BackboneConfig(model=str(tiny_model_folder), max_length=16),
        DataConfig(source=str(tiny_csv)),
        optim=OptimConfig(epochs=1, batch_size=8),
        store=StoreConfig(root=str(tmp_path_factory.mktemp("store"))),
        shuffles=1,
    )
    head = MethodConfig("exit-head", 1, 2, {"layer": 2})
    two, four = MethodConfig("revmux", 2, 1), MethodConfig("revmux", 4, 1)
    return [replace(base, method=method) for method in (head, two, four)]


@pytest.fixture(scope="module")
def plan(recipes: list[Recipe], task: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """An allowance that every system meets, so that the cheapest is chosen."""
    measure = replace(COUNTED, throughput_inputs=8, throughput_batch=4, throughput_pairs=1, price=2.5)
    return plan_here(recipes, task, Goal(allowance=100.0), tmp_path_factory.mktemp("plan"), measure=measure)


def test_the_selection_set_is_taken_from_train_and_never_from_test(task: TaskData) -> None:
    choosing = for_choosing(task, SplitConfig(share=0.25))
    assert len(choosing.test) == round(0.25 * len(task.train))
    before = sorted(row["text"] for row in task.train)
    assert sorted(row["text"] for split in (choosing.train, choosing.test) for row in split) == before
    assert choosing.identity["sha256"] != task.identity["sha256"]
    assert len(for_choosing(task, SplitConfig(limit=6)).test) == 6
    with pytest.raises(UserError, match="too few"):
        for_choosing(replace(task, train=task.train.select(range(3))), SplitConfig())


def test_a_sentence_and_its_phrases_are_on_the_same_side_of_the_division() -> None:
    """Of SST-2's phrases, most of a random slice lie whole inside a training text."""
    random = np.random.default_rng(0)
    sentences = [" ".join(f"s{number}w{word}" for word in range(12)) for number in range(60)]
    words = [sentence.split() for sentence in sentences]
    cuts = [(row, *sorted(random.choice(13, 2, replace=False))) for row in range(60) for _ in range(8)]
    phrases = [" ".join(words[row][start:end]).capitalize() for row, start, end in cuts]
    texts = sentences + phrases + ["shared words"] * 5
    order = random.permutation(len(texts))
    train = Dataset.from_dict({"text": [texts[row] for row in order], "label": [int(row % 2) for row in order]})
    whole = TaskData(train, train, train, ["bad", "good"], {"sha256": "a"})
    choosing = for_choosing(whole, SplitConfig(share=0.3))

    def inside(small: str, large: str) -> bool:
        return f" {small.lower()} " in f" {large.lower()} "

    assert 0.25 * len(texts) < len(choosing.test) <= 0.3 * len(texts) + 1
    assert len(choosing.train) + len(choosing.test) == len(texts)
    assert not [text for text in choosing.test["text"] if any(inside(text, other) for other in choosing.train["text"])]
    again = for_choosing(whole, SplitConfig(share=0.3))
    assert list(again.test["text"]) == list(choosing.test["text"])


def test_the_choosing_set_has_two_parts_that_share_no_sentence(task: TaskData) -> None:
    texts = [f"a{row} b c d e" for row in range(20)] + [f"A{row} b c" for row in range(20)]
    rows = Dataset.from_dict({"text": texts, "label": [0, 1] * 20})
    first, second = divide(rows, 0.25, seed=3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(40))
    assert len(first) == 10
    assert {row % 20 for row in first.tolist()}.isdisjoint({row % 20 for row in second.tolist()})
    assert torch.equal(divide(rows, 0.25, seed=3)[1], second)
    assert not torch.equal(divide(rows, 0.25, seed=4)[1], second)
    with pytest.raises(UserError, match="3 inputs, too few to be divided"):
        divide(rows.select(range(3)), 0.25, seed=0)


def test_the_cheapest_system_is_chosen_and_its_reasons_are_written(plan: Plan) -> None:
    assert plan.is_met
    written = json.loads((plan.folder / "plan.json").read_text())
    systems = written["systems"]
    assert {system["method"] for system in systems} == {"siso", "exit-head", "revmux"}
    accepted = [system for system in systems if system["fits"]]
    assert all(system["throughput_ratio"] > 0 for system in accepted)
    cheapest = max(accepted, key=lambda system: system["throughput_ratio"])
    assert written["chosen"] == cheapest["name"]
    assert (written["outcome"], written["served"][-1]["verification"]["outcome"]) == ("proven", "proven")
    assert written["compared"] > len(systems)
    assert written["siso_inputs_per_second"] > 0
    page = (plan.folder / "plan.md").read_text()
    assert "| system | inputs per second | a million answers |\n|---|---|---|\n| plain model |" in page
    assert {path.name for path in plan.folder.iterdir()} >= {
        "plan.json",
        "plan.md",
        "front.png",
        "front.html",
        "trials",
    }
    page = (plan.folder / "plan.md").read_text()
    assert cheapest["name"] in page
    assert "Verified once" in page
    assert written["meta"]["data"]["test"] == written["served"][-1]["verification"]["inputs"]


def test_a_plan_names_the_adapter_of_every_stage_for_bulk_use(plan: Plan, tmp_path: Path) -> None:
    assert adapter_sources(BulkConfig(input="rows.csv", output="out", plan=str(plan.folder))) == plan.adapters
    stages = [{"adapter": "adapters/stage1-n1"}, {"adapter": str(tmp_path / "stage2-n2")}]
    content = {"is_met": True, "why_not": None, "served": [{"stages": stages}]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    found = adapter_sources(BulkConfig(input="rows.csv", output="out", plan=str(tmp_path)))
    assert found == [str(tmp_path / "adapters" / "stage1-n1"), str(tmp_path / "stage2-n2")]
    (tmp_path / "plan.json").write_text(json.dumps(content | {"version": PLAN_VERSION + 1}))
    with pytest.raises(UserError, match="reads versions up to 2"):
        adapter_sources(BulkConfig(input="rows.csv", output="out", plan=str(tmp_path)))


def test_served_adapters_contain_their_thresholds_and_answer_as_verified(
    plan: Plan, recipes: list[Recipe], task: TaskData, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plan.folder, tmp_path / "plan"))
    # Counted costs: on a busy machine the plain model may measure fastest, and then no adapter is served.
    counted = plan_here(recipes, task, Goal(allowance=100.0), folder, measure=COUNTED)
    features = OnlineFeatures(tiny_pretrained.tokenize(task.test, 16), tiny_pretrained.backbone)
    assert counted.served
    for one in counted.served:
        stages = one.judged.candidate.stages
        assert len(one.folders) == len(stages) > 0
        built = []
        for folder_of, stage in zip(one.folders, stages):
            config = load_adapter_config(folder_of)
            assert (config.fallback_threshold, config.num_inputs) == (stage.threshold, stage.num_inputs)
            built.append(Stage(load_adapter(folder_of, tiny_pretrained), config.fallback_threshold or 0.0))
        found = evaluate_ladder(Ladder(built), features, shuffles=2, grouping="length").figures
        assert one.verification.siso_accuracy == pytest.approx(found.siso_accuracy)
        assert one.verification.accuracy == pytest.approx(found.accuracy_mean)


def test_trained_adapters_are_reused(plan: Plan, recipes: list[Recipe], task: TaskData) -> None:
    trained = {path: path.stat().st_mtime_ns for path in plan.folder.glob("trials/*/*.safetensors")}
    assert len(trained) == len(recipes)
    again = plan_here(recipes, task, Goal(allowance=0.0), plan.folder, measure=COUNTED)
    assert {path: path.stat().st_mtime_ns for path in plan.folder.glob("trials/*/*.safetensors")} == trained
    # On so few inputs only the plain model is surely without loss.
    assert [one.judged.candidate.name for one in again.served] == ["siso"]
    assert again.is_met
    assert again.adapters == []
    assert "the plain model is the choice" in (plan.folder / "plan.md").read_text()


def test_an_unreachable_goal_is_reported_with_the_gap_and_the_nearest_system(
    plan: Plan, recipes: list[Recipe], task: TaskData
) -> None:
    missed = plan_here(recipes, task, Goal(allowance=0.0, throughput=50.0), plan.folder, measure=COUNTED)
    assert not missed.is_met
    assert missed.why_not().startswith("the goal cannot be met: it is missed by 49.00 times SISO's throughput")
    written = json.loads((plan.folder / "plan.json").read_text())
    assert written["why_not"] == missed.why_not()
    assert (written["chosen"], written["served"]) == (None, [])


def test_a_promise_that_fails_verification_is_reported(plan: Plan) -> None:
    served = plan.served[-1]
    broken = replace(served, verification=replace(served.verification, outcome="exceeded", loss=3.5, allowance=1.0))
    found = replace(plan, served=[served, broken])
    assert (found.outcome, found.is_met) == ("exceeded", False)
    assert "lost 3.50 points, 2.50 more than allowed" in found.why_not()


def test_candidates_are_judged_on_the_stored_answers_of_the_plain_model(plan: Plan, task: TaskData) -> None:
    siso = plan.choice.siso.candidate
    assert set(np.unique(siso.correct)) <= {0.0, 1.0}
    assert len(siso.correct) + plan.choice.inputs == round(0.2 * len(task.train)) + len(task.selection)
    for one in plan.choice.judged:
        assert 0 <= one.candidate.fallback <= 1
        assert torch.isfinite(torch.tensor(one.candidate.cost))


def test_recipes_of_two_backbones_are_refused(recipes: list[Recipe], task: TaskData, tmp_path: Path) -> None:
    other = replace(recipes[0], backbone=replace(recipes[0].backbone, max_length=8))
    with pytest.raises(UserError, match="several backbones"):
        plan_here([recipes[0], other], task, Goal(allowance=1.0), tmp_path)
    with pytest.raises(UserError, match="no recipe"):
        plan_here([], task, Goal(allowance=1.0), tmp_path)


def test_whole_systems_are_timed_with_their_thresholds(
    plan: Plan, recipes: list[Recipe], task: TaskData, tiny_pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[list[float]] = []

    def ratio(plain: object, ladder: Ladder, batches: object, pairs: int) -> Ratio:
        timed.append([stage.threshold for stage in ladder.stages])
        return Ratio(2.0, 1.9, 2.1, pairs, 400.0)

    monkeypatch.setattr(measure, "paired_throughput", ratio)
    split = tiny_pretrained.tokenize(task.test, 16)
    bench = Bench(tiny_pretrained, split, recipes[0].store, replace(COUNTED, throughput_inputs=4))
    single = next(one.candidate for one in plan.choice.judged if one.candidate.first.method == "exit-head")
    system = replace(single, stages=(replace(single.first, threshold=0.7),))
    (found,) = bench.timed([system])
    assert timed == [[0.7]]
    assert (found.throughput_ratio, found.cost, bench.siso_rate) == (2.0, 0.5, 400.0)


def test_a_ladder_is_written_as_one_adapter_per_stage_and_served_as_planned(
    recipes: list[Recipe], task: TaskData, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    head, pairs, _ = recipes
    first = replace(head, method=MethodConfig("exit-head", 1, 1, {"layer": 1}))
    second = replace(pairs, method=MethodConfig("revmux", 2, 2))
    adapters = train_recipes([first, second], task, tmp_path / "trials")
    split = tiny_pretrained.tokenize(task.test, 16)
    bench = Bench(tiny_pretrained, split, recipes[0].store, COUNTED)
    scores = bench.scores(adapters, torch.arange(len(split)))
    medians = [float(np.median(one.confidence)) for one in scores]
    stages = tuple(
        replace(one.stage, threshold=median, going_on=share) for one, median, share in zip(scores, medians, (0.5, 0.2))
    )
    ladder = Candidate(stages, np.ones(len(split)), 0.5)
    folders = write_stages(ladder, tmp_path / "adapters")
    configs = [load_adapter_config(folder) for folder in folders]
    assert [config.stage for config in configs] == [1, 2]
    assert [config.fallback_threshold for config in configs] == medians
    assert [config.metrics["share_on"] for config in configs] == pytest.approx([0.5, 0.4])
    correct = bench.correct(ladder)
    assert correct.shape == (len(split),)
    assert 0 < correct.mean() < 1
    engine = Engine(tiny_pretrained, list(folders), Limits(plain_load=0))
    futures = engine.submit(list(task.test["text"]))
    with engine:
        answers = [future.result(60) for future in futures]
    assert {answer.stage for answer in answers} == {0, 1, 2}
    sure = [float(confidence(answer.scores)) for answer in answers if answer.stage == 1]
    assert min(sure) >= medians[0]
    found = np.array([int(answer.scores.argmax()) for answer in answers]) == np.array(task.test["label"])
    assert found.mean() == pytest.approx(correct.mean(), abs=0.2)  # other groups
