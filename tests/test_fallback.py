"""Fallback by confidence: unsure answers are the plain model's, at the cost of only the remaining layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from numeric import assert_close
from serving_models import CUT, load, plain_scores, text, write_adapter, write_model

from revmux.adapters.config import load_adapter_config
from revmux.adapters.folder import save_adapter
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.estimate.flops import count_flops, relative_cost, resume_cost
from revmux.fallback import check_threshold, confidence, resume
from revmux.features.online import OnlineFeatures
from revmux.grouping import shuffled_groups
from revmux.ladder import Ladder, Stage
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine, Limits
from revmux.training.evaluation import evaluate, predict
from revmux.training.ladder_evaluation import evaluate_ladder

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(32)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    made = load(write_model(tmp_path_factory.mktemp("model")))
    made.backbone.freeze()
    return made


@pytest.fixture(scope="module")
def model(pretrained: Pretrained) -> MultiplexedClassifier:
    return unsure_model(pretrained)


@pytest.fixture(scope="module")
def features(pretrained: Pretrained) -> OnlineFeatures:
    labels = plain_scores(pretrained, TEXTS).argmax(-1)
    labels[::4] = (labels[::4] + 1) % 3  # the plain model is right three times in four
    split = Dataset.from_dict({"text": TEXTS, "label": labels.tolist()})
    return OnlineFeatures(TokenizedSplit(split, pretrained.tokenizer, 64), pretrained.backbone)


def unsure_model(pretrained: Pretrained, num_inputs: int = 2) -> MultiplexedClassifier:
    """An adapter with random weights, whose answers differ from the plain model's."""
    torch.manual_seed(1)
    method = build_method("revmux", BackboneShape.of(pretrained.backbone), num_inputs)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return MultiplexedClassifier(pretrained.backbone, method, CUT).requires_grad_(False).eval()


def test_confidence_is_the_probability_of_the_likeliest_class() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert_close(confidence(scores), torch.tensor([0.66524096, 1 / 3]))
    assert_close(confidence(torch.tensor([[-2.0], [2.0], [0.0]])), torch.tensor([0.880797, 0.880797, 0.5]))


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_resuming_from_the_cut_is_bit_for_bit_the_plain_model(pretrained: Pretrained, layers: int) -> None:
    backbone = pretrained.backbone
    tokens = dict(pretrained.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    with torch.inference_mode():
        assert torch.equal(resume(backbone, backbone.run(backbone.embed(tokens), layers)), backbone(tokens))


def test_a_resumed_input_costs_the_layers_above_the_cut_and_the_head(pretrained: Pretrained) -> None:
    backbone = pretrained.backbone
    siso = build_method("siso", BackboneShape.of(backbone), 1)
    whole = count_flops(backbone, siso, 0, 12)
    layer = whole.upper / 4
    for layers in range(5):
        expected = (4 - layers) * layer + whole.head
        assert resume_cost(backbone, layers, 12) == pytest.approx(expected / whole.per_input)


def test_thresholds_interpolate_between_the_adapter_and_the_plain_model(
    model: MultiplexedClassifier, features: OnlineFeatures
) -> None:
    never, some, always = (
        evaluate_ladder(Ladder([Stage(model, threshold)]), features, shuffles=3, seed=4) for threshold in (0, 0.6, 1)
    )
    expected = evaluate(model, features, shuffles=3, seed=4)
    length = round(float(features.lengths.double().mean()))
    base = relative_cost(model.backbone, model.method, CUT, length)
    resumed = resume_cost(model.backbone, CUT, length)
    assert never.figures.metrics() == pytest.approx(expected.metrics(), nan_ok=True)
    assert (never.answered, never.cost) == ((0, 1), base)
    assert always.figures.accuracy_mean == expected.siso_accuracy != expected.accuracy_mean
    assert always.figures.accuracy_std == 0
    assert (always.answered, always.cost) == ((1, 0), base + resumed)
    (share,) = some.going_on
    assert 0 < share < 1
    assert some.cost == pytest.approx(base + share * resumed)
    correct = torch.zeros(len(features), dtype=torch.float64)
    by_hand = 0.0
    for shuffle in range(3):
        labels, teacher, scores = predict(model, features, shuffled_groups(len(features), 2, 4, shuffle))
        assert teacher is not None
        unsure = scores.softmax(-1).max(-1).values < 0.6
        correct += (torch.where(unsure, teacher, labels) == features.labels).double() / 3
        by_hand += float(unsure.double().mean()) / 3
    assert_close(some.correct, correct)
    assert share == pytest.approx(by_hand)
    assert some.figures.accuracy_mean == pytest.approx(float(correct.mean()))


def test_an_exit_head_falls_back_too(pretrained: Pretrained, features: OnlineFeatures) -> None:
    head = build_method("exit-head", BackboneShape.of(pretrained.backbone), 1, {"layer": 2})
    model = MultiplexedClassifier(pretrained.backbone, head, 2)
    never, always = (evaluate_ladder(Ladder([Stage(model, threshold)]), features) for threshold in (0, 1))
    assert always.cost - never.cost == pytest.approx(
        resume_cost(pretrained.backbone, 2, round(float(features.lengths.double().mean())))
    )
    assert always.figures.accuracy_mean == evaluate(model, features).siso_accuracy


def test_a_threshold_for_a_method_that_cannot_fall_back_is_refused(
    pretrained: Pretrained, model: MultiplexedClassifier
) -> None:
    shape = BackboneShape.of(pretrained.backbone)
    slots = build_method("datamux", shape, 2, {"demultiplexer": "index", "tune_backbone": False})
    tuned = build_method("revmux", shape, 2, {"tune_backbone": True})
    check_threshold(0, slots)
    for method, reason in ((slots, "changes the tokens"), (tuned, "tunes the backbone")):
        with pytest.raises(UserError, match=f"cannot fall back: the method {reason}"):
            check_threshold(0.5, method)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"choose a confidence in 0\.\.1"):
            Ladder([Stage(model, threshold)])


@pytest.fixture
def make_engine(pretrained: Pretrained, model: MultiplexedClassifier, tmp_path: Path) -> Callable[..., Engine]:
    """An engine that always multiplexes, with an adapter that contains its own threshold."""
    config = load_adapter_config(write_adapter(tmp_path, pretrained, 2))

    def make(own: float | None, override: float | None) -> Engine:
        recorded = replace(config, method="revmux", options=model.method.options_dict(), fallback_threshold=own)
        folder = save_adapter(model, recorded, tmp_path / "unsure")
        return Engine(pretrained, [folder], Limits(plain_load=0), threshold=override)

    return make


def test_unsure_answers_resume_at_the_cut_and_are_the_plain_models(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    expected = plain_scores(pretrained, TEXTS)
    engine = make_engine(0.6, None)
    rows: dict[int, list[int]] = {layer: [] for layer in range(4)}
    for layer, own in rows.items():
        pretrained.backbone.layer(layer).register_forward_pre_hook(
            lambda module, inputs, own=own: own.append(len(inputs[0]))
        )
    futures = engine.submit(TEXTS)
    with engine:
        answers = [future.result(60) for future in futures]
    for layer in rows:
        pretrained.backbone.layer(layer)._forward_pre_hooks.clear()
    fell = [answer.fell_back for answer in answers]
    assert 0 < sum(fell) < len(fell)
    for answer, scores in zip(answers, expected):
        assert answer.width == 2
        if answer.fell_back:
            torch.testing.assert_close(answer.scores, scores, atol=1e-3, rtol=0)
        else:
            assert float(confidence(answer.scores)) >= 0.6
    assert sum(rows[0]) == len(TEXTS)  # every input ran once below the cut
    assert [sum(rows[layer]) for layer in (1, 2, 3)] == [len(TEXTS) // 2 + sum(fell)] * 3
    assert engine.stats()["fell_back"] == sum(fell)
    assert engine.stats()["seconds"]["resume"] > 0


@pytest.mark.parametrize(("own", "override", "share"), [(None, None, 0), (0.6, 0.0, 0), (None, 1.0, 1), (0.01, 1.0, 1)])
def test_the_threshold_of_the_operator_overrides_that_of_the_adapter(
    make_engine: Callable[..., Engine], own: float | None, override: float | None, share: int
) -> None:
    with make_engine(own, override) as engine:
        answers = [future.result(60) for future in engine.submit(TEXTS)]
    assert [answer.fell_back for answer in answers] == [bool(share)] * len(TEXTS)


def test_plain_answers_never_fall_back(make_engine: Callable[..., Engine]) -> None:
    with make_engine(None, 1.0) as engine:
        assert not engine.submit(["w1"], max_multiplex=1)[0].result(60).fell_back


def test_a_threshold_of_the_operator_that_an_adapter_cannot_use_is_refused(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, pretrained, 2, 0, method="datamux", demultiplexer="index", tune_backbone=False)
    with pytest.raises(UserError, match=r"datamux-2.*cannot fall back"):
        Engine(pretrained, [folder], threshold=0.9)
    Engine(pretrained, [folder], threshold=0.0)
