"""Answers of the serving engine without Ray: exact alone, each request's own in a group, and truncated only on request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from serving_models import WORDS, load, plain_scores, text, write_adapter
from torch import Tensor

from revmux.errors import EmptyText, TextError
from revmux.labels import rank_labels
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.task_model import save_task_model
from revmux.serving import Engine

pytestmark = pytest.mark.numeric


def test_a_single_input_is_bit_for_bit_the_plain_model(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine()
    engine.start()
    for index in range(5):
        answer = engine.submit([text(index)])[0].result(60)
        assert answer.width == 1
        assert torch.equal(answer.scores, plain_scores(pretrained, [text(index)])[0])


def test_a_batch_of_plain_inputs_is_bit_for_bit_the_plain_model(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine()
    texts = [" ".join(WORDS[start : start + 9]) for start in range(12)]  # equal lengths, so their order is kept
    grouped = engine.submit([text(19)] * 8)
    futures = engine.submit(texts, max_multiplex=1)
    engine.start()
    answers = [future.result(60) for future in futures]
    assert {future.result(60).width for future in grouped} == {4}
    assert {answer.width for answer in answers} == {1}
    assert torch.equal(torch.stack([answer.scores for answer in answers]), plain_scores(pretrained, texts))


def test_plain_answers_are_bit_for_bit_those_of_the_hugging_face_model_on_the_same_batch(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    """Texts of many lengths: answers are exact against the padded batch that the engine built."""
    batches: list[dict[str, Tensor]] = []
    pretrained.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0]))
    engine = make_engine()
    texts = [text(index) for index in range(0, 40, 2)]
    futures = engine.submit(texts, max_multiplex=1)
    engine.start()
    answers = [future.result(60) for future in futures]
    expected: dict[tuple[int, ...], Tensor] = {}
    with torch.inference_mode():
        for tokens in batches:
            for ids, mask, row in zip(
                tokens["input_ids"], tokens["attention_mask"].bool(), pretrained.backbone.model(**tokens).logits
            ):
                expected[tuple(ids[mask].tolist())] = row
    assert len(batches) < len(texts), "several texts share a batch"
    assert len(expected) == len(texts)
    for own, answer in zip(texts, answers):
        assert answer.width == 1
        assert torch.equal(answer.scores, expected[tuple(pretrained.tokenizer(own)["input_ids"])])
        # Alone, the same text has another shape, and its scores may differ by rounding.
        assert_close(answer.scores, plain_scores(pretrained, [own])[0])


def test_every_request_gets_its_own_answer(make_engine: Callable[..., Engine], pretrained: Pretrained) -> None:
    texts = [text(index) for index in range(500)]
    expected = plain_scores(pretrained, texts)
    engine = make_engine(max_batch=60, max_batch_tokens=700)
    futures = []
    for start in range(0, 500, 5):
        futures += engine.submit(texts[start : start + 5], max_multiplex=(None, 1, 2, 4)[start // 5 % 4])
    engine.start()
    answers = [future.result(120) for future in futures]
    found = torch.stack([answer.scores for answer in answers])
    assert {1, 2, 4} == {answer.width for answer in answers}
    assert expected.unique(dim=0).shape[0] > 300
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    stats = engine.stats()
    assert sum(stats["inputs"].values()) == 500
    assert sum(stats["groups"].values()) < 350


def test_answers_keep_their_dtype_while_another_model_is_loaded(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine()
    texts = [text(index) for index in range(16)]
    engine.start()
    expected = [future.result(60) for future in engine.submit(texts)]
    torch.set_default_dtype(torch.bfloat16)  # process-wide, as transformers does while it loads a model in bfloat16
    try:
        found = [future.result(60) for future in engine.submit(texts)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert max(answer.width for answer in found) == 4
    for one, other in zip(found, expected):
        assert one.scores.dtype == torch.float32
        if (one.width, other.width) == (4, 4):
            assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("bad", ["", ("w1", ""), 7, ("a", "b", "c"), "bad \ud800", "w1 " * 63])
def test_an_invalid_text_is_refused_before_it_is_batched_with_others(
    make_engine: Callable[..., Engine], bad: Any
) -> None:
    engine = make_engine()
    with pytest.raises(TextError) as caught:
        engine.submit(["w1", bad, "w2"])
    assert isinstance(caught.value, EmptyText) == (bad in ("", ("w1", "")))
    assert engine.stats()["waiting"] == 0


def test_a_long_text_is_truncated_only_on_request_and_the_answer_reports_it(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine()
    engine.start()
    long = " ".join(WORDS + WORDS)
    with pytest.raises(TextError, match="122 tokens, but at most 64"):
        engine.submit([long])
    cut, fits = [future.result(60) for future in engine.submit([long, " ".join(WORDS)], truncate=True)]
    assert cut.truncated
    assert not fits.truncated
    expected = pretrained.tokenizer([long], truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        assert_close(cut.scores, pretrained.backbone(dict(expected))[0])


def test_a_pair_is_one_input(make_engine: Callable[..., Engine], pretrained: Pretrained) -> None:
    engine = make_engine()
    engine.start()
    tokens = pretrained.tokenizer("w1 w2", "w3", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(engine.submit([("w1 w2", "w3")])[0].result(60).scores, pretrained.backbone(dict(tokens))[0])


@pytest.mark.parametrize("recorded_by", ["the task model", "the adapter"])
@pytest.mark.parametrize("pairs", [True, False, None])
def test_a_pair_is_refused_if_the_task_was_trained_on_single_texts(
    pretrained: Pretrained, tmp_path: Path, recorded_by: str, pairs: bool | None
) -> None:
    adapter = write_adapter(tmp_path, pretrained, 2)
    if recorded_by == "the task model":
        folder = save_task_model(pretrained, tmp_path / "task-model", pairs)
        pretrained = load(folder)
        assert pretrained.pairs is pairs
    elif pairs is not None:
        recorded = json.loads((adapter / "adapter_config.json").read_text())
        recorded["task"]["pairs"] = pairs
        (adapter / "adapter_config.json").write_text(json.dumps(recorded))
    with Engine(pretrained, [adapter]) as engine:
        assert engine.submit(["w1 w2"])[0].result(60)
        if pairs is False:
            with pytest.raises(TextError, match="trained on single texts; send each text as a separate input"):
                engine.submit([("w1 w2", "w3")])
        else:
            assert engine.submit([("w1 w2", "w3")])[0].result(60)


def test_labels_are_sorted_best_first() -> None:
    scores = torch.tensor([0.0, 2.0, 1.0])
    assert [label for label, _ in rank_labels(scores, ["a", "b", "c"])] == ["b", "c", "a"]
    assert sum(score for _, score in rank_labels(scores, ["a", "b", "c"])) == pytest.approx(1)
    assert rank_labels(scores, ["a", "b", "c"], "none", top_k=1) == [("b", 2.0)]
    assert rank_labels(torch.tensor([0.0]), ["only"]) == [("only", 0.5)]
