"""Learned confidence: it is fitted to stored answers, and evaluation, server and bulk jobs apply it in the same way."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from numeric import assert_close
from serving_models import load, plain_scores, text, write_model, write_stage
from torch import Tensor

from revmux.adapters.config import load_adapter_config
from revmux.adapters.folder import load_adapter
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.data.tokens import TokenizedSplit
from revmux.deferral import Deferral, deferral_features
from revmux.errors import UserError
from revmux.features.online import OnlineFeatures
from revmux.ladder import Ladder, Stage
from revmux.plan.candidate import PlannedStage
from revmux.plan.learn import LEAST, first_stages, fit_deferral, later_stages
from revmux.plan.search import StageScores, search
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine, Limits
from revmux.training.ladder_evaluation import evaluate_ladder

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(40)]
FIRST = Deferral((0.3, 0.2, -0.6), 1.5)
SECOND = Deferral((0.4, 0.0, 0.3, -0.2, -0.5), 1.8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pretrained(model: Path) -> Pretrained:
    made = load(model)
    made.backbone.freeze()
    return made


@pytest.fixture(scope="module")
def folders(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two exit heads of one input each, so that a group has no influence, with learned confidences."""
    folder = tmp_path_factory.mktemp("stages")
    made = []
    for stage, deferral in enumerate((FIRST, SECOND), 1):
        written = write_stage(folder, pretrained, stage, 1, stage, 0.5, method="exit-head", layer=stage)
        edit(written, deferral=asdict(deferral))
        made.append(written)
    return made


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def ladder_of(folders: list[Path], pretrained: Pretrained) -> Ladder:
    configs = [load_adapter_config(folder) for folder in folders]
    return Ladder(
        [
            Stage(load_adapter(folder, pretrained), config.fallback_threshold or 0.0, config.learned)
            for folder, config in zip(folders, configs)
        ]
    )


def by_hand(deferral: Deferral, passed: list[Tensor], length: int) -> float:
    """The learned confidence of one input from the scores (C) of each stage."""
    logs = [scores.double().log_softmax(-1) for scores in passed]
    answer = int(passed[-1].argmax())
    features = []
    for log in logs:
        first, second = sorted(log.tolist(), reverse=True)[:2]
        features += [float(log[answer]), first - second]
    features.append(math.log(length))
    logit = deferral.bias + sum(weight * feature for weight, feature in zip(deferral.weights, features))
    return 1 / (1 + math.exp(-logit))


def test_evaluation_server_and_bulk_apply_the_learned_confidence_of_every_stage(
    folders: list[Path], model: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    ladder = ladder_of(folders, pretrained)
    alone = [stage.model for stage in ladder.stages]
    tokens = dict(pretrained.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    with torch.no_grad():
        first, second = (one(tokens) for one in alone)
    lengths = tokens["attention_mask"].sum(dim=1).tolist()
    sure = [by_hand(FIRST, [one], length) for one, length in zip(first, lengths)]
    then = [by_hand(SECOND, [one, two], length) for one, two, length in zip(first, second, lengths)]
    stages = [1 if one >= 0.5 else 2 if two >= 0.5 else 0 for one, two in zip(sure, then)]
    assert min(stages.count(stage) for stage in (0, 1, 2)) >= 3, "every stage answers some inputs"
    plain = plain_scores(pretrained, TEXTS)
    scores = torch.stack([(plain, first, second)[stage][row] for row, stage in enumerate(stages)])

    found = ladder.classify(tokens)
    assert found.stage.tolist() == stages
    assert_close(found.scores, scores)

    split = Dataset.from_dict({"text": TEXTS, "label": scores.argmax(-1).tolist()})
    features = OnlineFeatures(TokenizedSplit(split, pretrained.tokenizer, 64), pretrained.backbone)
    evaluated = evaluate_ladder(ladder, features, shuffles=1)
    assert evaluated.answered == pytest.approx([stages.count(stage) / len(stages) for stage in (0, 1, 2)])
    assert evaluated.figures.accuracy_mean == 1.0

    engine = Engine(load(model), [str(folder) for folder in folders], Limits(plain_load=0))
    futures = engine.submit(TEXTS)
    with engine:
        answers = [future.result(60) for future in futures]
    assert [answer.stage for answer in answers] == stages
    assert_close(torch.stack([answer.scores for answer in answers]), scores)

    pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_csv(tmp_path / "rows.csv", index=False)
    plan = {"is_met": True, "served": [{"stages": [{"adapter": str(folder)} for folder in folders]}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    output = tmp_path / "answers"
    classify_files(
        BulkConfig(
            input=str(tmp_path / "rows.csv"),
            output=str(output),
            model=str(model),
            plan=str(tmp_path / "plan.json"),
        )
    )
    written = pd.concat([pd.read_parquet(part) for part in sorted(output.glob("*.parquet"))])
    assert written.sort_values("id", key=lambda column: column.astype(int))["stage"].tolist() == stages


def test_a_score_that_is_not_finite_does_not_go_on() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.0], [float("nan"), 0.0, 1.0], [float("inf"), 0.0, 1.0]])
    never = Deferral((0.0, 0.0, 0.0), -50.0)
    assert (never.confidence([scores], torch.tensor([5, 5, 5])) < 0.9).tolist() == [True, False, False]


def test_one_score_counts_as_two_classes() -> None:
    single = torch.tensor([[1.5], [-0.4]])
    both = torch.cat([torch.zeros_like(single), single], dim=1)
    lengths = torch.tensor([3, 9])
    torch.testing.assert_close(deferral_features([single], lengths), deferral_features([both], lengths))


@pytest.mark.parametrize(
    ("deferral", "message"),
    [
        ({"weights": [0.1, 0.2], "bias": 0.0}, "stage 1 needs 3 finite weights and a bias"),
        ({"weights": [0.1, 0.2, None], "bias": 0.0}, "stage 1 needs 3 finite weights"),
        ({"weights": [0.1, 0.2, 0.3]}, "stage 1 needs 3 finite weights"),
    ],
)
def test_a_damaged_model_is_refused_when_the_adapter_is_read(
    pretrained: Pretrained, tmp_path: Path, deferral: dict[str, Any], message: str
) -> None:
    folder = write_stage(tmp_path, pretrained, 1, 1, 1, 0.5, method="exit-head", layer=1)
    assert load_adapter_config(folder).learned is None
    edit(folder, deferral=deferral)
    with pytest.raises(UserError, match=message):
        load_adapter_config(folder)


def test_adapters_of_the_former_format_have_the_plain_confidence(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = write_stage(tmp_path, pretrained, 1, 1, 1, 0.5, method="exit-head", layer=1)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["deferral"]
    file.write_text(json.dumps(content | {"format_version": 1}))
    assert load_adapter_config(folder).learned is None


def stage_scores(
    random: np.random.Generator, name: str, layer: int, margin: np.ndarray, noisy: np.ndarray
) -> StageScores:
    """A head whose answers differ from the plain model's (class 1) where the noise exceeds the margin."""
    noise = random.normal(size=len(margin)) * np.where(noisy, 2.0, 0.3)
    scores = np.stack([np.zeros_like(margin), margin + noise], axis=1)[None].astype(np.float32)  # (1, M, 2)
    agrees = scores.argmax(-1) == 1
    confidence = torch.from_numpy(scores).softmax(-1).amax(-1).numpy()
    lengths = np.where(noisy, 40, 10)
    stage = PlannedStage(name, "exit-head", 1, layer, folder=name)
    return StageScores(
        stage, agrees, confidence, layer / 6, layer / 6, 1 - layer / 6, True, agrees, scores, lengths.astype(np.int64)
    )


def test_what_plain_confidence_does_not_know_is_learned_and_lowers_the_cost_of_the_front() -> None:
    """The answers to long inputs are unreliable, and two stages that agree are more reliable than one."""
    random = np.random.default_rng(0)

    def pool(inputs: int) -> list[StageScores]:
        margin, noisy = random.exponential(1.5, inputs), random.random(inputs) < 0.3
        return [stage_scores(random, f"layer{layer}", layer, margin, noisy) for layer in (1, 2)]

    selection, scores = pool(1500), pool(3000)
    siso = np.ones(3000)
    plain = search(scores, siso)
    first = first_stages(selection, scores)
    assert [one.follows for one in first] == [(), ()]
    assert all(one.stage.deferral.weights[-1] < 0 for one in first if one.stage.deferral), "long inputs are unsure"
    found = search([*scores, *first], siso)
    later = later_stages(selection, scores, found.front)
    assert [(one.stage.adapter, one.follows) for one in later] == [("layer2", ("layer1",))]
    found = search([*scores, *first, *later], siso)

    def cost_at(front: Any, bound: float) -> float:
        return min(one.cost for one in front if one.expected_bound <= bound)

    for bound in (2.0, 5.0):
        assert cost_at(found.front, bound) < cost_at(plain.front, bound) - 0.02
    learned = later[0].stage.deferral
    assert learned is not None
    passed = [torch.from_numpy(one.scores) for one in scores]
    again = learned.confidence(passed, torch.from_numpy(scores[0].lengths)[None])
    assert (again < 0.9).float().mean() > 0.05
    near = np.abs(again.numpy()[scores[1].agrees].mean() - 1.0)
    assert near < np.abs(again.numpy()[~scores[1].agrees].mean() - 1.0), "it is higher where the answers agree"


def test_too_few_differing_answers_teach_nothing() -> None:
    random = np.random.default_rng(1)
    one = stage_scores(random, "head", 1, np.full(500, 5.0), np.zeros(500, bool))
    assert int((~one.agrees).sum()) < LEAST
    assert fit_deferral([torch.from_numpy(one.scores)], torch.from_numpy(one.lengths)[None], one.agrees) is None
    assert first_stages([one], [one]) == []
    stuck = replace(one, can_go_on=False)
    assert first_stages([stuck], [stuck]) == []
