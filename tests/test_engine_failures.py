"""A failing pass, row or thread costs its own requests and no others."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from serving_models import plain_scores, text

from revmux.errors import EmptyText
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Draining, Engine, InferenceFailed

pytestmark = pytest.mark.numeric


def test_a_failing_batch_fails_its_own_requests_and_no_others(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    model = engine.task().lineup.adapters[1].model
    grouped = engine.submit([text(19)] * 8)
    alone = engine.submit(["w1"], max_multiplex=1)
    with monkeypatch.context() as patch:
        patch.setattr(model.method, "multiplex", lambda states: 1 / 0)
        engine.start()
        for future in grouped:
            with pytest.raises(InferenceFailed, match="ZeroDivisionError"):
                future.result(60)
        assert alone[0].result(60).width == 1
    assert engine.submit(["w1"])[0].result(60).scores.shape == (3,)
    assert engine.stats()["failed"] == 8


def test_scores_that_are_not_finite_fail_the_request(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.task().backbone), "score", lambda self, vector: vector[..., :3] * float("nan"))
        with pytest.raises(InferenceFailed, match="not finite"):
            engine.probe().result(60)
    assert engine.probe().result(60).width == 1


def _break_rows(monkeypatch: pytest.MonkeyPatch, engine: Engine, mark: int) -> None:
    """Make the states of every input that contains a given token infinite."""
    backbone = engine.task().backbone
    embed = backbone.embed

    def broken(tokens: dict[str, torch.Tensor]) -> Any:
        state = embed(tokens)
        bad = (tokens["input_ids"] == mark).any(dim=1)
        return replace(state, hidden=state.hidden.masked_fill(bad[:, None, None], float("inf")))

    monkeypatch.setattr(backbone, "embed", broken)


def test_a_row_that_is_not_finite_fails_only_its_own_input(
    make_engine: Callable[..., Engine], pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    texts = ["w1 w2", "w3 w59", "w4 w5", "w6"]
    expected = plain_scores(pretrained, texts)
    _break_rows(monkeypatch, engine, pretrained.tokenizer.convert_tokens_to_ids("w59"))
    futures = engine.submit(texts, max_multiplex=1)
    engine.start()
    for place in (0, 2, 3):
        assert torch.equal(futures[place].result(60).scores, expected[place])
    with pytest.raises(InferenceFailed, match="not finite"):
        futures[1].result(60)
    stats = engine.stats()
    assert (stats["failed"], stats["inputs"], stats["groups"], stats["passes"]) == (1, {1: 3}, {1: 3}, 1)


def test_partners_of_a_row_that_is_not_finite_run_again_alone(
    make_engine: Callable[..., Engine], pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(plain_load=0)
    texts = [*(text(19) for _ in range(8)), "w59 " + text(16)]
    _break_rows(monkeypatch, engine, pretrained.tokenizer.convert_tokens_to_ids("w59"))
    futures = engine.submit(texts[:3] + texts[8:] + texts[3:7])
    engine.start()
    answers = [None if place == 3 else future.result(60) for place, future in enumerate(futures)]
    with pytest.raises(InferenceFailed, match="not finite"):
        futures[3].result(60)
    widths = [answer.width for answer in answers if answer is not None]
    assert sorted(widths) == [1, 1, 1, 4, 4, 4, 4]
    for answer in answers:
        if answer is not None and answer.width == 1:
            torch.testing.assert_close(answer.scores, plain_scores(pretrained, [text(19)])[0])
            assert answer.method == "siso"
    stats = engine.stats()
    assert (stats["failed"], stats["inputs"], stats["groups"], stats["passes"]) == (1, {4: 4, 1: 3}, {4: 1, 1: 3}, 2)
    assert stats["tokens"] == sum(len(part.split()) + 2 for part in texts[:7] + texts[8:] + texts[:3] + texts[8:])


def test_a_pass_that_runs_out_of_memory_is_halved_down_to_one_group(
    make_engine: Callable[..., Engine], pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine([])
    backbone = engine.task().backbone
    embed, sizes = backbone.embed, []
    huge = pretrained.tokenizer.convert_tokens_to_ids("w59")

    def small(tokens: dict[str, torch.Tensor]) -> Any:
        sizes.append(len(tokens["input_ids"]))
        if sizes[-1] > 3 or (tokens["input_ids"] == huge).any():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return embed(tokens)

    texts = ["w1", "w2", "w3 ", "w4", "w5", "w59", "w6", "w7"]
    expected = plain_scores(pretrained, texts)
    monkeypatch.setattr(backbone, "embed", small)
    futures = engine.submit(texts)
    engine.start()
    for place, future in enumerate(futures):
        if place == 5:
            with pytest.raises(InferenceFailed, match="OutOfMemoryError"):
                future.result(60)
        else:
            torch.testing.assert_close(future.result(60).scores, expected[place])
    assert sizes == [8, 4, 2, 2, 4, 2, 1, 1, 2]
    stats = engine.stats()
    assert (stats["failed"], stats["inputs"], stats["passes"]) == (1, {1: 7}, 4)


def test_a_failed_pass_leaves_none_of_its_tensors_behind(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine([])
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail(state: Any, *_: object) -> None:
        kept.append(weakref.ref(state.hidden))
        raise RuntimeError("a failed kernel")

    monkeypatch.setattr(engine.task().backbone, "run", fail)
    engine.start()
    failure = engine.submit(["w1"])[0].exception(60)
    assert isinstance(failure, InferenceFailed)
    with pytest.raises(InferenceFailed, match="a failed kernel"):
        engine.submit(["w2"])[0].result(60)  # the model is busy with something else now
    assert kept[0]() is None


def test_requests_that_wait_are_tokenized_together_and_one_bad_request_fails_alone(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that panics on one text, which is no Exception, costs its own request only."""
    engine = make_engine([])
    encoder = engine.task().encoder
    original, calls, hold = encoder.encode_many, [], threading.Event()

    class Panic(BaseException):
        pass

    def encode_many(texts: Any, truncate: bool = False) -> Any:
        calls.append(len(texts))
        assert hold.wait(60)
        if "panic" in texts:
            raise Panic("the tokenizer panicked")
        return original(texts, truncate)

    monkeypatch.setattr(encoder, "encode_many", encode_many)

    async def ask() -> list[Any]:
        first = []
        for occupied in (1, 2):  # each occupies a thread
            first.append(asyncio.create_task(engine.answer(["w1"])))
            while len(calls) < occupied:
                await asyncio.sleep(0.01)
        texts = [["w2"], ["panic"], ["w3", ""], ["w4", "w5"]]
        waiting = [asyncio.create_task(engine.answer(request)) for request in texts]
        while engine._tokenizers._jobs.qsize() < len(texts):
            await asyncio.sleep(0.01)
        hold.set()
        return await asyncio.gather(*first, *waiting, return_exceptions=True)

    engine.start()
    *answered, panicked, empty, pair = asyncio.run(ask())
    assert [len(answers) for answers in (*answered, pair)] == [1, 1, 1, 2]
    assert isinstance(panicked, RuntimeError)
    assert "panicked" in str(panicked)
    assert isinstance(empty, EmptyText)
    assert max(calls) >= 4
    assert engine.stats()["waiting"] == 0


def test_when_the_models_thread_ends_by_a_bug_waiting_requests_get_a_retryable_error(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine([], max_batch=1)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._queue, "charge", lambda *_: 1 / 0)
    first, second = engine.submit(["w1", "w2"])
    engine.start()
    assert first.result(60)
    assert isinstance(second.exception(60), Draining)
    with pytest.raises(Draining):
        engine.submit(["w3"])
