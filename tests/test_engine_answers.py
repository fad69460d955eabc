"""The serving engine without Ray: exactness, limits, failures, and every request gets its own answer."""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from serving_models import CUT, WORDS, load, plain_scores, text, write_adapter, write_model
from torch import Tensor

from revmux.errors import EmptyText, TextError, UserError
from revmux.labels import rank_labels
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.task_model import save_task_model
from revmux.serving import Draining, Engine, InferenceFailed, Limits, Overloaded

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pretrained(model_folder: Path) -> Pretrained:
    return load(model_folder)


@pytest.fixture
def adapters(pretrained: Pretrained, tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path, pretrained, num_inputs) for num_inputs in (2, 4)]


@pytest.fixture
def make_engine(pretrained: Pretrained, adapters: list[Path]) -> Iterator[Callable[..., Engine]]:
    """Build engines that are not started, so that a test can fill the queue first; all are closed at the end."""
    made: list[Engine] = []

    def make(folders: list[Path] | None = None, **limits: Any) -> Engine:
        made.append(Engine(pretrained, adapters if folders is None else folders, Limits(**limits)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


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


@pytest.mark.parametrize(("waiting", "width"), [(1, 1), (3, 1), (64, 4)])
def test_the_engine_takes_all_waiting_inputs_and_chooses_the_width_from_their_number(
    make_engine: Callable[..., Engine], waiting: int, width: int
) -> None:
    engine = make_engine()
    futures = [engine.submit([text(index)])[0] for index in range(waiting)]
    engine.start()
    assert {future.result(60).width for future in futures} == {width}
    assert engine.stats()["groups"] == {width: waiting // width}


def test_the_width_respects_the_bounds_of_the_operator_and_of_the_request(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine(max_multiplex=3)
    engine.start()
    assert [route.width for route in engine.task().lineup.routes] == [1, 2]
    free = make_engine()
    bounded = free.submit([text(index) for index in range(30)], max_multiplex=3)
    others = free.submit([text(index) for index in range(30)], max_multiplex=99)
    free.start()
    assert max(future.result(60).width for future in bounded) == 2
    assert max(future.result(60).width for future in others) == 4
    with pytest.raises(UserError, match="max_multiplex is 0"):
        free.submit(["w1"], max_multiplex=0)


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


def test_adapters_cut_at_different_layers_serve_one_batch(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    folders = [
        write_adapter(tmp_path, pretrained, 2, prefill_layers=2),
        write_adapter(tmp_path, pretrained, 4, prefill_layers=CUT),
    ]
    engine = make_engine(folders)
    texts = [text(index) for index in range(40)]
    futures = engine.submit(texts[:20], max_multiplex=2) + engine.submit(texts[20:])
    engine.start()
    answers = [future.result(60) for future in futures]
    assert {answer.width for answer in answers[:20]} == {2}
    assert {answer.width for answer in answers[20:]} == {4}
    torch.testing.assert_close(
        torch.stack([answer.scores for answer in answers]), plain_scores(pretrained, texts), atol=1e-3, rtol=0
    )


def test_adapters_with_the_same_cut_share_the_prefill(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.submit(["w1 w2 w3"] * 8, max_multiplex=2)
    futures = engine.submit(["w4 w5 w6"] * 8)
    batches: list[int] = []
    handle = (
        engine.task()
        .backbone.layer(0)
        .register_forward_hook(lambda layer, inputs, output: batches.append(len(inputs[0])))
    )
    engine.start()
    futures[-1].result(60)
    handle.remove()
    assert batches == [16]


def test_a_method_whose_tokens_depend_on_the_slot_is_served(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = write_adapter(
        tmp_path, pretrained, 2, prefill_layers=0, method="datamux", demultiplexer="index", tune_backbone=False
    )
    engine = make_engine([folder], plain_load=0)
    futures = engine.submit([text(index) for index in range(6)])
    engine.start()
    answers = [future.result(60) for future in futures]
    assert {answer.width for answer in answers} == {2}
    assert engine.task().max_length == 64 - engine.task().lineup.adapters[0].model.method.added_tokens


def test_adapter_that_tuned_the_backbone_is_refused(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, pretrained, 2, method="revmux", tune_backbone=True)
    with pytest.raises(UserError, match="tuned the backbone"):
        make_engine([folder])


def test_cancelled_requests_leave_the_queue_and_are_not_computed(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_queue=4)
    futures = [engine.submit([text(index)])[0] for index in range(4)]
    assert futures[1].cancel()
    assert futures[2].cancel()
    futures += engine.submit(["w1", "w2"])  # their places are free at once
    engine.start()
    assert all(future.result(60) for future in futures if not future.cancelled())
    assert sum(engine.stats()["inputs"].values()) == 4
    assert engine.stats()["cancelled"] == 2


def test_a_full_queue_refuses_the_whole_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_queue=5)
    kept = engine.submit(["w1", "w2", "w3"])
    with pytest.raises(Overloaded, match="at most 5"):
        engine.submit(["w4", "w5", "w6"])
    kept += engine.submit(["w4", "w5"])
    engine.start()
    assert [future.result(60).scores.shape for future in kept] == [(3,)] * 5
    assert engine.stats()["rejected"] == 3


def test_batches_are_bounded(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=8, max_batch_tokens=256)
    sizes: list[torch.Size] = []
    handle = (
        engine.task()
        .backbone.layer(0)
        .register_forward_hook(lambda layer, inputs, output: sizes.append(inputs[0].shape))
    )
    futures = engine.submit([text(index) for index in range(60)])
    engine.start()
    assert all(future.result(60) for future in futures)
    handle.remove()
    assert max(shape[0] for shape in sizes) <= 8
    assert max(shape[0] * shape[1] for shape in sizes) <= 256


def test_limits_too_small_for_one_group_are_refused(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(UserError, match="one group of 4 inputs of 64 tokens"):
        make_engine(max_batch_tokens=255)
    with pytest.raises(UserError, match="max_queue is 0"):
        Limits(max_queue=0)


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


def test_closing_answers_waiting_requests_and_refuses_new_ones(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    futures = engine.submit([text(index) for index in range(9)])
    engine.start()
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert not engine.alive
    with pytest.raises(Draining):
        engine.submit(["w1"])
    with pytest.raises(Draining):
        engine.probe()


def test_closing_an_engine_that_never_ran_fails_waiting_requests(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    future = engine.submit(["w1"])[0]
    engine.close()
    assert isinstance(future.exception(), Draining)


def test_a_probe_runs_ahead_of_a_full_queue(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine([], max_queue=3, max_batch=1)
    futures = engine.submit(["w1", "w2", "w3"])
    order: list[str] = []
    futures[0].add_done_callback(lambda future: order.append("first"))
    probe = engine.probe()
    assert engine.probe() is probe
    probe.add_done_callback(lambda future: order.append("probe"))
    engine.start()
    engine.close()
    assert order == ["probe", "first"]


def test_answering_does_not_block_the_event_loop_and_a_cancelled_call_is_not_computed(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()

    async def scenario() -> None:
        abandoned = asyncio.create_task(engine.answer(["w1", "w2"]))
        while engine.stats()["waiting"] < 2:
            await asyncio.sleep(0)
        abandoned.cancel()
        with pytest.raises(asyncio.CancelledError):
            await abandoned
        while engine.stats()["waiting"]:
            await asyncio.sleep(0)
        engine.start()
        answers = await asyncio.gather(*(engine.answer([text(index), text(index + 1)]) for index in range(20)))
        assert [len(found) for found in answers] == [2] * 20
        with pytest.raises(TextError):
            await engine.answer(["w1", ""])

    asyncio.run(scenario())
    assert sum(engine.stats()["inputs"].values()) == 40


def test_labels_are_sorted_best_first() -> None:
    scores = torch.tensor([0.0, 2.0, 1.0])
    assert [label for label, _ in rank_labels(scores, ["a", "b", "c"])] == ["b", "c", "a"]
    assert sum(score for _, score in rank_labels(scores, ["a", "b", "c"])) == pytest.approx(1)
    assert rank_labels(scores, ["a", "b", "c"], "none", top_k=1) == [("b", 2.0)]
    assert rank_labels(torch.tensor([0.0]), ["only"]) == [("only", 0.5)]


def test_the_model_uses_as_many_threads_as_the_thread_that_built_the_engine(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    former, used = torch.get_num_threads(), []
    torch.set_num_threads(former + 2)
    try:
        engine = make_engine()
        forward = type(engine.task().backbone).forward
        monkeypatch.setattr(
            type(engine.task().backbone),
            "forward",
            lambda self, tokens: used.append(torch.get_num_threads()) or forward(self, tokens),
        )
        engine.start()
        engine.submit(["w1"])[0].result(60)
    finally:
        torch.set_num_threads(former)
    assert set(used) == {former + 2}


def test_the_audit_counts_how_often_answers_agree_with_the_plain_model(
    pretrained: Pretrained, make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    wrong = write_adapter(tmp_path, pretrained, 8, method="revmux")  # untrained
    for folders, share in ((None, 1.0), ([wrong], None)):
        engine = make_engine(folders, plain_load=0.0, audit=1.0)
        futures = engine.submit([text(index) for index in range(40)])
        engine.start()
        labels = [int(future.result(60).scores.argmax()) for future in futures]
        engine.close()  # the last audit runs after the last answer
        plain = plain_scores(pretrained, [text(index) for index in range(40)]).argmax(1).tolist()
        counted = engine.stats()["tasks"]["default"]
        assert counted["audited"] == 40
        assert counted["agreed"] == sum(own == other for own, other in zip(labels, plain))
        assert share is None or counted["agreed"] == 40 * share


def test_nothing_is_audited_by_default(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(plain_load=0.0)
    futures = engine.submit([text(index) for index in range(8)])
    engine.start()
    for future in futures:
        future.result(60)
    engine.close()
    assert engine.stats()["audited"] == 0


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
