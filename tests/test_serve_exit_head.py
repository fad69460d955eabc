"""Serving exit heads: exact without load, cheaper under load, and deployable from a plan that chose one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from numeric import assert_close
from serving_http import listening
from serving_models import CUT, load, plain_scores, text, write_adapter, write_model
from torch import Tensor

from ray_jobs.cluster import ClusterConfig
from ray_jobs.planning.config import PlanJob
from ray_jobs.planning.run import check_server
from revmux.adapters.folder import load_adapter
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.model import MultiplexedClassifier
from revmux.plan.build import plan_here
from revmux.plan.config import Goal, MeasureConfig
from revmux.plan.plan import Plan
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine, Limits
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.web import create_app

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(24)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return load(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def head(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    return write_adapter(folder, pretrained, 1, CUT, "exit-head", layer=CUT)


@pytest.fixture(scope="module")
def four(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("four"), pretrained, 4)


@pytest.fixture
def make_engine(pretrained: Pretrained, head: Path) -> Iterator[Callable[..., Engine]]:
    """Build engines that are not started; all are closed at the end."""
    made: list[Engine] = []

    def make(*adapters: Path, **settings: Any) -> Engine:
        threshold = settings.pop("threshold", None)
        made.append(Engine(pretrained, adapters or [head], Limits(**settings), threshold=threshold))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def head_scores(pretrained: Pretrained, folder: Path, texts: list[str]) -> Tensor:
    """Return the scores of the exit head on one padded batch, (B, C)."""
    model: MultiplexedClassifier = load_adapter(folder, pretrained)
    with torch.inference_mode():
        return model(dict(pretrained.tokenizer(texts, padding=True, return_tensors="pt")))


def test_the_engine_is_exact_without_load_and_answers_with_the_exit_head_under_load(
    make_engine: Callable[..., Engine], pretrained: Pretrained, head: Path
) -> None:
    engine = make_engine()
    futures = engine.submit(TEXTS)
    engine.start()
    loaded = [future.result(60) for future in futures]
    assert {(answer.width, answer.method) for answer in loaded} == {(1, "exit-head")}
    scores = torch.stack([answer.scores for answer in loaded])
    assert_close(scores, head_scores(pretrained, head, TEXTS))
    assert not torch.allclose(scores, plain_scores(pretrained, TEXTS), atol=0.1)
    quiet = engine.submit(TEXTS[:1])[0].result(60)
    assert (quiet.width, quiet.method) == (1, "siso")
    assert torch.equal(quiet.scores, plain_scores(pretrained, TEXTS[:1])[0])
    assert engine.stats()["methods"] == {"exit-head": len(TEXTS), "siso": 1}


def test_a_request_for_the_plain_model_gets_it_under_any_load(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine(plain_load=0)
    waiting = engine.submit(TEXTS)
    exact = engine.submit(["w1 w2 w3"], max_multiplex=1)
    engine.start()
    answer = exact[0].result(60)
    assert answer.method == "siso"
    assert torch.equal(answer.scores, plain_scores(pretrained, ["w1 w2 w3"])[0])
    assert {future.result(60).method for future in waiting} == {"exit-head"}
    assert engine.probe().result(60).method == "siso"


def test_with_a_maximum_width_of_one_exit_heads_are_not_used(make_engine: Callable[..., Engine], head: Path) -> None:
    engine = make_engine(plain_load=0, max_multiplex=1)
    engine.start()
    assert engine.submit(["w1"])[0].result(60).method == "siso"
    with pytest.raises(UserError, match="serves N = 1, but max_multiplex is 1"):
        engine.load(head)


def test_an_exit_head_is_used_beside_cheaper_groups_and_instead_of_others(
    make_engine: Callable[..., Engine], pretrained: Pretrained, head: Path, four: Path
) -> None:
    # Cut after 1 of 4 layers, a group of four costs 1/4 + 3/16 per input: between a head at layer 1 and one at layer 3.
    engine = make_engine(four, head, plain_load=0)
    assert [route.method for route in engine.task().lineup.routes] == ["siso", "exit-head"]
    deep = make_engine(four, write_head(pretrained, head, 3), plain_load=0)
    assert [route.method for route in deep.task().lineup.routes] == ["siso", "exit-head", "token-split"]
    grouped, alone = deep.submit(TEXTS[:12]), deep.submit(TEXTS[12:], max_multiplex=3)
    deep.start()
    answers = [future.result(60) for future in grouped + alone]
    assert [answer.method for answer in answers] == ["token-split"] * 12 + ["exit-head"] * 12
    assert {answer.width for answer in answers[:12]} == {4}
    expected = plain_scores(pretrained, TEXTS[:12])
    torch.testing.assert_close(torch.stack([a.scores for a in answers[:12]]), expected, atol=1e-3, rtol=0)


def write_head(pretrained: Pretrained, beside: Path, layer: int) -> Path:
    folder = beside.with_name(f"layer-{layer}")
    folder.mkdir(exist_ok=True)
    return write_adapter(folder, pretrained, 1, layer, "exit-head", layer=layer)


def test_an_unsure_exit_head_falls_back_to_the_plain_model(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine(plain_load=0, threshold=1.0)
    futures = engine.submit(TEXTS)
    engine.start()
    answers = [future.result(60) for future in futures]
    assert all(answer.fell_back and answer.method == "exit-head" for answer in answers)
    found = torch.stack([answer.scores for answer in answers])
    assert_close(found, plain_scores(pretrained, TEXTS))


def test_exit_heads_can_be_added_and_removed(
    make_engine: Callable[..., Engine], pretrained: Pretrained, head: Path
) -> None:
    engine = make_engine(plain_load=0)
    engine.start()
    deeper = engine.load(write_head(pretrained, head, 2))
    assert engine.task().lineup.adapters == (deeper,)
    engine.retire(1)
    assert engine.submit(["w1"])[0].result(60).method == "siso"


@pytest.fixture(scope="module")
def recipe(tiny_model_folder: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(
        BackboneConfig(model=str(tiny_model_folder), max_length=16),
        DataConfig(source=str(tiny_csv)),
        optim=OptimConfig(epochs=1, batch_size=8),
        store=StoreConfig(root=str(tmp_path_factory.mktemp("store"))),
        shuffles=1,
    )


@pytest.fixture(scope="module")
def plan(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Every system is within the allowance, and the exit head has the lowest counted cost."""
    recipes = [
        replace(recipe, method=method)
        for method in (MethodConfig("exit-head", 1, 1, {"layer": 1}), MethodConfig("revmux", 2, 1))
    ]
    measure = MeasureConfig(shuffles=1, throughput_inputs=0, thresholds=(0.0,))
    folder = tmp_path_factory.mktemp("plan")
    return plan_here(recipes, load_task(recipe.data), Goal(allowance=100.0), folder, measure=measure)


def test_a_plan_that_chose_an_exit_head_can_be_deployed(plan: Plan, recipe: Recipe) -> None:
    assert plan.choice.chosen is not None
    assert plan.choice.chosen.candidate.first.method == "exit-head"
    job = PlanJob(
        backbone=recipe.backbone, data=recipe.data, goal=Goal(allowance=100.0), cluster=ClusterConfig(workers=1)
    )
    settings = check_server(job, plan.adapters, "sqlite:///nowhere.db")
    (application,) = settings["applications"]
    config = AppConfig.model_validate(application["args"] | {"plain_load": 3.0})
    service = Service(config)
    try:
        service.serve(config.served)
        with listening(create_app(service)) as url:
            texts = ["w1 w5", "w2 w6", "w1 w7", "w2 w8"]
            body = {"inputs": [[part] for part in texts], "raw_scores": True}
            loaded = httpx.post(f"{url}/predict", json=body, timeout=60)
            assert loaded.headers["x-revmux-method"] == ",".join(["exit-head"] * 4)
            assert loaded.headers["x-revmux-width"] == "1,1,1,1"
            assert loaded.headers["x-revmux-group"] == "1,2,3,4"
            own = load_pretrained(recipe.backbone)
            expected = head_scores(own, Path(plan.adapters[0]), texts)
            for reply, scores in zip(loaded.json(), expected.tolist()):
                found = {item["label"]: item["score"] for item in reply}
                assert [found[label] for label in own.backbone.label_names] == pytest.approx(scores, abs=1e-4)
            quiet = httpx.post(f"{url}/predict", json={"inputs": texts[0]}, timeout=60)
            assert quiet.headers["x-revmux-method"] == "siso"
            exact = httpx.post(f"{url}/predict", json=body | {"max_multiplex": 1}, timeout=60)
            assert exact.headers["x-revmux-method"] == ",".join(["siso"] * 4)
            info = httpx.get(f"{url}/info", timeout=60).json()
            (adapter,) = info["adapters"]
            assert (adapter["method"], adapter["num_inputs"], adapter["used"]) == ("exit-head", 1, True)
            assert (info["group_widths"], info["max_multiplex"]) == ([1], 1)
            figures = httpx.get(f"{url}/metrics", timeout=60).text
            assert 'revmux_method_inputs_total{method="exit-head",replica="0",task="default"} 4.0' in figures
    finally:
        service.close()
