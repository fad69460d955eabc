"""One text for several tasks: the tasks run their common lowest layers once, and answer as if each were asked alone."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import approx
from polling import wait_until
from serving_models import load, write_adapter, write_identifying_model, write_model
from tiny_models import tiny_classifier
from torch import Tensor
from transformers import BertForSequenceClassification

import revmux.serving.model_thread
from revmux.backbone import Backbone
from revmux.errors import TextError, UserError
from revmux.serving import Answer, Engine, Expired, InferenceFailed, Limits, Overloaded, UnknownTask
from revmux.serving.lower_layers import LowerLayers
from revmux.serving.shared_weights import WeightPool

pytestmark = pytest.mark.numeric

LAYERS = 4
TEXTS = [f"w{index} w{index + 1} w{index + 2}" for index in range(6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task models: ``plain`` and ``named`` differ in the head alone, ``upper`` also above layer 2, ``other`` everywhere."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("plain", "named", "upper", "other")}
    for name in ("plain", "upper", "other"):
        write_model(made[name])
    write_identifying_model(made["named"], seed=1)
    for name, layer in (("upper", 2), ("other", 0)):
        model = BertForSequenceClassification.from_pretrained(made[name])
        with torch.no_grad():
            model.bert.encoder.layer[layer].output.dense.bias += 0.5
            if name == "other":
                model.bert.embeddings.word_embeddings.weight[10] += 1
        model.save_pretrained(made[name])
    return made


def make(folders: dict[str, Path], adapters: dict[str, list[Path]] | None = None, **limits: Any) -> Engine:
    engine = Engine(limits=Limits(**limits))
    for name, folder in folders.items():
        engine.add_task(name, load(folder), (adapters or {}).get(name, []))
    return engine


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    """An engine that is not started, so that a test can fill the queue first."""
    made = make(folders, max_queue=20)
    yield made
    made.close()


def ask(engine: Engine, tasks: Sequence[str], texts: Sequence[str] = TEXTS, **options: Any) -> list[list[Answer]]:
    """Queue one request for several tasks, and start the engine only then."""

    async def request() -> list[list[Answer]]:
        waiting = asyncio.create_task(engine.answer_tasks(texts, tasks, **options))
        queued = len(texts) * len(tasks)
        await asyncio.to_thread(wait_until, lambda: waiting.done() or engine.stats()["waiting"] == queued)
        engine.start()
        return await waiting

    return asyncio.run(request())


def count_rows(engine: Engine) -> Counter[tuple[str, int]]:
    """Count how many sequences each layer of each task runs."""
    rows: Counter[tuple[str, int]] = Counter()
    for name, task in engine.tasks.items():
        for index in range(LAYERS):

            def counted(_: Any, arguments: Any, key: tuple[str, int] = (name, index)) -> None:
                rows[key] += len(arguments[0])

            task.backbone.layer(index).register_forward_pre_hook(counted)
    return rows


def test_plain_models_run_their_common_layers_once_and_answer_bit_for_bit_as_alone(
    engine: Engine, folders: dict[str, Path]
) -> None:
    rows = count_rows(engine)
    tasks = ["plain", "named", "upper", "other"]
    found = dict(zip(tasks, ask(engine, tasks, max_multiplex=1)))
    texts = len(TEXTS)
    # All four layers for the first task and for the one with nothing in common, none where only the head differs.
    by_task = {task: [rows[task, index] for index in range(LAYERS)] for task in tasks}
    assert by_task["plain"] == by_task["other"] == [texts] * LAYERS
    assert by_task["named"] == [0] * LAYERS
    assert by_task["upper"] == [0, 0, texts, texts]
    for task, answers in found.items():
        with make({task: folders[task]}) as single:
            expected = [future.result(60) for future in single.submit(TEXTS, max_multiplex=1)]
        assert all(torch.equal(one.scores, two.scores) for one, two in zip(answers, expected, strict=True))
    counted = engine.stats()["tasks"]
    assert {task: counted[task]["shared_prefill"] for task in tasks} == {
        "plain": 0,
        "named": texts,
        "upper": texts,
        "other": 0,
    }
    assert {task: counted[task]["cost"] for task in tasks} == {
        "plain": texts,
        "named": 0,  # the head alone, which is not counted
        "upper": texts / 2,
        "other": texts,
    }


def test_groups_of_several_tasks_share_the_prefill(folders: dict[str, Path], tmp_path: Path) -> None:
    """K tasks at width N and cut l run l + K · (L − l) / N layers per text instead of K · (l + (L − l) / N)."""
    tasks, width, cut = ["plain", "named", "upper"], 2, 1
    served = {task: folders[task] for task in tasks}
    adapters = {task: [write_adapter(tmp_path / task, load(folder), width)] for task, folder in served.items()}
    engine = make(served, adapters, plain_load=0)
    rows = count_rows(engine)
    found = dict(zip(tasks, ask(engine, tasks)))
    engine.close()
    assert {answer.width for answers in found.values() for answer in answers} == {width}
    assert sum(rows.values()) / len(TEXTS) == cut + len(tasks) * (LAYERS - cut) / width
    route = engine.task("plain").lineup.routes[1]
    assert engine.stats()["cost"] == approx(len(TEXTS) * (route.alone + len(tasks) * route.shared / width))
    for task in tasks:
        with make({task: served[task]}, adapters, plain_load=0) as single:
            expected = [future.result(60) for future in single.submit(TEXTS)]
        assert all(torch.equal(one.scores, two.scores) for one, two in zip(found[task], expected, strict=True))


def test_inputs_of_one_task_join_a_pass_of_groups_that_others_share(folders: dict[str, Path], tmp_path: Path) -> None:
    tasks = ["plain", "upper"]
    served = {task: folders[task] for task in tasks}
    adapters = {task: [write_adapter(tmp_path / task, load(folder), 2)] for task, folder in served.items()}
    engine = make(served, adapters, plain_load=0)
    more = engine.submit(["w30 w31 w32", "w33 w34 w35"], task="plain")

    async def request() -> list[list[Answer]]:
        waiting = asyncio.create_task(engine.answer_tasks(TEXTS, tasks))
        await asyncio.to_thread(wait_until, lambda: engine.stats()["waiting"] == 2 + 2 * len(TEXTS))
        engine.start()
        return await waiting

    found = asyncio.run(request())
    engine.close()
    passes = {task: engine.stats()["tasks"][task]["passes"] for task in tasks}
    assert passes == {"plain": 1, "upper": 1}
    assert engine.stats()["tasks"]["upper"]["shared_prefill"] == len(TEXTS)
    for task, answers in zip(tasks, found):
        with make({task: served[task]}) as single:
            expected = [future.result(60).scores for future in single.submit(TEXTS, max_multiplex=1)]
        torch.testing.assert_close(
            torch.stack([one.scores for one in answers]), torch.stack(expected), atol=1e-3, rtol=0
        )
    assert all(future.result(60).width == 2 for future in more)


def test_a_pass_holds_no_more_inputs_of_all_tasks_than_max_batch(folders: dict[str, Path]) -> None:
    tasks = ["plain", "named", "upper"]
    reports: list[int] = []
    engine = Engine(
        limits=Limits(max_batch=len(TEXTS) * 2), on_pass=lambda report: reports.append(report.shared_prefill)
    )
    for task in tasks:
        engine.add_task(task, load(folders[task]))
    found = ask(engine, tasks, max_multiplex=1)
    engine.close()
    assert [len(answers) for answers in found] == [len(TEXTS)] * 3
    assert reports == [0, len(TEXTS), 0]  # the third task runs its lower layers itself


def test_tasks_with_equal_tokenizers_tokenize_a_text_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = {task.encoder for task in engine.tasks.values()}
    assert len(encoders) == 1
    [encoder] = encoders
    original, calls = encoder.encode_many, []
    monkeypatch.setattr(encoder, "encode_many", lambda texts, cut: calls.append(len(texts)) or original(texts, cut))
    ask(engine, ["plain", "named"])
    assert calls == [len(TEXTS)]


def test_a_task_with_another_limit_has_its_own_tokens_and_errors(engine: Engine, folders: dict[str, Path]) -> None:
    engine.add_task("short", load(folders["plain"]), max_length=4)
    assert engine.task("short").encoder is not engine.task("plain").encoder
    with pytest.raises(TextError, match="task 'short': an input has 5 tokens, but at most 4"):
        ask(engine, ["plain", "short"])
    found = asyncio.run(engine.answer_tasks(TEXTS[:1], ["plain", "short"], truncate=True))
    assert [answers[0].truncated for answers in found] == [False, True]
    assert engine.stats()["shared_prefill"] == 0
    found = asyncio.run(engine.answer_tasks(["w1"], ["plain", "short"], max_multiplex=1))
    assert engine.stats()["shared_prefill"] == 1  # a text with the same tokens in both tasks
    assert torch.equal(found[0][0].scores, found[1][0].scores)


@pytest.mark.parametrize("error", [ZeroDivisionError("broken"), torch.OutOfMemoryError("CUDA out of memory.")])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["several texts", "one text"])
def test_a_task_that_fails_in_a_joint_pass_runs_again_alone(
    engine: Engine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, texts: list[str]
) -> None:
    original, failed = revmux.serving.model_thread.run_pass, []

    def run_pass(backbone: Any, *arguments: Any) -> Any:
        if not failed:
            failed.append(backbone)
            raise error
        return original(backbone, *arguments)

    monkeypatch.setattr("revmux.serving.model_thread.run_pass", run_pass)
    found = ask(engine, ["plain", "named"], texts, max_multiplex=1)
    for task, answers in zip(("plain", "named"), found):
        with make({task: folders[task]}) as single:
            expected = [future.result(60).scores for future in single.submit(texts, max_multiplex=1)]
        torch.testing.assert_close(torch.stack([one.scores for one in answers]), torch.stack(expected))


def test_a_task_that_fails_alone_too_leaves_the_others_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, broken = revmux.serving.model_thread.run_pass, engine.task("plain").backbone

    def run_pass(backbone: Any, *arguments: Any) -> Any:
        if backbone is broken:
            raise ZeroDivisionError("broken")
        return original(backbone, *arguments)

    monkeypatch.setattr("revmux.serving.model_thread.run_pass", run_pass)
    with pytest.raises(InferenceFailed, match="task 'plain' failed on this input: ZeroDivisionError"):
        ask(engine, ["plain", "named"], max_multiplex=1)
    wait_until(lambda: sum(engine.stats()["tasks"]["named"]["inputs"].values()) == len(TEXTS))


def test_a_request_that_one_task_refuses_is_queued_for_none(engine: Engine) -> None:
    engine.submit(["w1"] * 20, task="named")
    with pytest.raises(Overloaded, match="no room for 1 more in task 'named'"):
        asyncio.run(engine.answer_tasks(["w1"], ["plain", "named"]))
    assert engine.stats()["tasks"]["plain"]["waiting"] == 0
    assert len(engine.submit(["w1"] * 20, task="plain")) == 20  # no place is left reserved
    with pytest.raises(UnknownTask, match="unknown task 'mood'; known tasks: named, other, plain, upper"):
        asyncio.run(engine.answer_tasks(["w1"], ["plain", "mood"]))
    with pytest.raises(UserError, match="task 'plain' is named twice"):
        asyncio.run(engine.answer_tasks(["w1"], ["plain", "plain"]))


def test_deadlines_and_cancellation_hold_for_all_tasks(engine: Engine) -> None:
    async def cancelled() -> None:
        request = asyncio.create_task(engine.answer_tasks(TEXTS, ["plain", "named"]))
        await asyncio.to_thread(wait_until, lambda: engine.stats()["waiting"] == 2 * len(TEXTS))
        request.cancel()
        await asyncio.wait([request])

    asyncio.run(cancelled())
    stats = engine.stats()
    assert stats["waiting"] == 0
    assert stats["cancelled"] == 2 * len(TEXTS)
    with pytest.raises(Expired):
        ask(engine, ["plain", "named"], timeout=1e-9)
    assert engine.stats()["expired"] == 2 * len(TEXTS)


TOKENS = {"input_ids": torch.tensor([[3, 7, 5, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "gpt2", "llama"])
def test_the_common_layers_end_below_the_first_weight_that_differs(family: str) -> None:
    own = tiny_classifier(family, pad_token_id=0)
    lower, pool = LowerLayers(own, TOKENS), WeightPool()
    pool.share(own)
    weights = [name for name, _ in own.named_parameters() if not name.endswith("bias")]
    depths = set()
    for changed in {weights[0], *weights[1::3], weights[-1]}:
        other = copy.deepcopy(own)
        with torch.no_grad():
            other.get_parameter(changed).add_(torch.randn_like(other.get_parameter(changed)))
        pool.share(other)
        depth = lower.in_common(LowerLayers(other, TOKENS))
        depths.add(depth)
        assert depth == 0 or torch.equal(states(own, depth), states(other, depth))
        assert depth == own.num_layers or not torch.equal(states(own, depth + 1), states(other, depth + 1))
    assert depths == {0, 1, 2, 3}
    assert lower.in_common(LowerLayers(tiny_classifier(family, pad_token_id=0, num_hidden_layers=2), TOKENS)) == 0


@torch.no_grad()
def states(backbone: Backbone, depth: int) -> Tensor:
    return backbone.run(backbone.embed(TOKENS), depth).hidden
