"""Inputs of several tasks with different texts: one batch through the common lowest layers, then task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numeric import assert_close
from serving_models import load, write_adapter, write_model
from transformers import BertForSequenceClassification

import revmux.serving.model_thread
from revmux.backbone import TokenBatch
from revmux.serving import Answer, Engine, Expired, InferenceFailed, Limits, PassReport, Task
from revmux.serving.forward import run_pass
from revmux.serving.scheduling import Group

pytestmark = pytest.mark.numeric

LAYERS = 4
TEXTS = {
    "plain": [f"w{index} w{index + 1} w{index + 2}" for index in range(6)],
    "upper": [f"w{index} w{index + 3} w{index + 5}" for index in range(20, 24)],
    "other": [f"w{index} w{index + 3} w{index + 5}" for index in range(30, 32)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task models: ``upper`` differs from ``plain`` above layer 2, ``other`` everywhere."""
    made = {name: tmp_path_factory.mktemp(name) for name in TEXTS}
    for folder in made.values():
        write_model(folder)
    for name in ("upper", "other"):
        model = BertForSequenceClassification.from_pretrained(made[name])
        with torch.no_grad():
            model.bert.encoder.layer[2].output.dense.bias += 0.5
            if name == "other":
                model.bert.embeddings.word_embeddings.weight[10] += 1
        model.save_pretrained(made[name])
    return made


class Served:
    """An engine with an adapter per task that is not started, so that a test can fill the queue first."""

    def __init__(self, folders: dict[str, Path], adapters: dict[str, Path], **limits: Any) -> None:
        self.reports: list[PassReport] = []
        self.engine = Engine(limits=Limits(**{"plain_load": 0, **limits}), on_pass=self.reports.append)
        for name, folder in folders.items():
            self.engine.add_task(name, load(folder), [adapters[name]], max_length=12)
        self.batches: dict[str, list[int]] = {name: [] for name in folders}  # sizes of the batches of each first layer
        for name, task in self.engine.tasks.items():

            def counted(_: Any, arguments: Any, sizes: list[int] = self.batches[name]) -> None:
                sizes.append(len(arguments[0]))

            task.backbone.layer(0).register_forward_pre_hook(counted)

    def queue(self, *tasks: str, **options: Any) -> dict[str, list[Future[Answer]]]:
        return {task: self.engine.submit(TEXTS[task], task=task, **options) for task in tasks}


@pytest.fixture
def serve(folders: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def build(*tasks: str, width: int = 2, **limits: Any) -> Served:
        adapters = {
            name: write_adapter(tmp_path / str(len(made)) / name, load(folder), width)
            for name, folder in folders.items()
        }
        made.append(Served({task: folders[task] for task in tasks or TEXTS}, adapters, **limits))
        return made[-1]

    yield build
    for served in made:
        served.engine.close(drain=False)


def scores(futures: list[Future[Answer]]) -> torch.Tensor:
    return torch.stack([future.result(60).scores for future in futures])


def test_groups_of_several_tasks_are_prefilled_in_one_batch(serve: Callable[..., Served]) -> None:
    served = serve()
    futures = served.queue(*TEXTS)
    served.engine.start()
    found = {task: scores(own) for task, own in futures.items()}
    served.engine.close()
    assert served.batches == {"plain": [10], "upper": [], "other": [2]}  # 'other' has no layer in common
    assert [(report.task, report.joint_prefill, report.shared_prefill) for report in served.reports] == [
        ("plain", 6, 0),
        ("upper", 4, 0),
        ("other", 0, 0),
    ]
    tasks = served.engine.tasks
    inputs = [tasks[name].encoder.encode(text).tokens for name in ("plain", "upper") for text in TEXTS[name]]
    tokens = tasks["plain"].padder.lists(inputs)
    for name, first in (("plain", 0), ("upper", 6)):
        assert torch.equal(found[name], run_groups(tasks[name], tokens, first, len(TEXTS[name])))  # the same batches
        alone = serve(name)
        expected = alone.queue(name)[name]
        alone.engine.start()
        assert_close(found[name], scores(expected), layers=LAYERS)


@pytest.mark.parametrize(
    ("max_batch", "batches"), [(6, {"plain": [4], "upper": [3]}), (16, {"plain": [7], "upper": []})]
)
def test_groups_that_are_not_full_join_only_if_a_pass_can_hold_all_that_waits(
    max_batch: int, batches: dict[str, list[int]], serve: Callable[..., Served]
) -> None:
    served = serve("plain", "upper", width=4, max_batch=max_batch)
    waiting = served.engine.submit(TEXTS["plain"][:4], task="plain")
    waiting += served.engine.submit(TEXTS["upper"][:3], task="upper")
    served.engine.start()
    scores(waiting)
    assert served.batches == batches


@torch.inference_mode()
def run_groups(task: Task, tokens: TokenBatch, first: int, inputs: int) -> torch.Tensor:
    """The scores of some inputs in groups of two, after a prefill of all."""
    rows = torch.arange(first, first + inputs)
    groups = [Group(task.lineup.routes[1], (row, row + 1)) for row in range(0, inputs, 2)]
    stages = task.lineup.stages
    state = stages[2].model.prefill(tokens).take(rows)
    own = {key: value[rows] for key, value in tokens.items()}
    return run_pass(task.backbone, stages, [], lambda: own, groups, [None] * inputs, lambda: state).scores


def test_plain_answers_are_exact_unless_the_operator_lets_them_share(serve: Callable[..., Served]) -> None:
    exact = serve("plain", "upper", plain_load=100)
    rounded = serve("plain", "upper", plain_load=100, share_plain=True)
    found = []
    for served in (exact, rounded):
        futures = served.queue("plain", "upper")
        served.engine.start()
        found.append({task: scores(own) for task, own in futures.items()})
    assert exact.batches == {"plain": [6], "upper": [4]}
    assert rounded.batches == {"plain": [10], "upper": []}
    for name in ("plain", "upper"):
        task = exact.engine.task(name)
        tokens = task.padder.lists([task.encoder.encode(text).tokens for text in TEXTS[name]])
        with torch.inference_mode():
            model = task.backbone.model(**tokens).logits
        assert torch.equal(found[0][name], model)
        assert_close(found[1][name], model, layers=LAYERS)
    assert all(report.cost == len(report.widths) for report in rounded.reports)  # a larger batch saves no operation


@pytest.mark.parametrize("limits", [{"max_batch": 8}, {"max_batch_tokens": 45}])  # a text has 5 tokens
def test_inputs_join_a_pass_up_to_its_limits(serve: Callable[..., Served], limits: dict[str, int]) -> None:
    served = serve("plain", "upper", **limits)
    futures = served.queue("plain", "upper")
    served.engine.start()
    served.engine.close()
    assert served.batches == {"plain": [8], "upper": [2]}
    assert all(future.result(60).width == 2 for own in futures.values() for future in own)


def test_much_longer_inputs_of_another_task_wait_for_a_pass_of_their_own(serve: Callable[..., Served]) -> None:
    served = serve("plain", "upper")
    served.queue("plain")
    served.engine.submit(["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 2, task="upper")
    served.engine.start()
    served.engine.close()
    assert served.batches == {"plain": [6], "upper": [2]}


def test_priorities_deadlines_and_cancellation_hold_in_a_common_pass(serve: Callable[..., Served]) -> None:
    served = serve("plain", "upper")
    late = served.queue("plain", timeout=1e-9)["plain"]
    plain = served.queue("plain")["plain"]
    upper = served.queue("upper", priority=5)["upper"]
    assert all(future.cancel() for future in (*upper[:2], *plain[:2]))
    served.engine.start()
    served.engine.close()
    for future in late:
        with pytest.raises(Expired):
            future.result(60)
    assert [(report.task, len(report.widths)) for report in served.reports] == [("upper", 2), ("plain", 4)]
    assert served.batches == {"plain": [], "upper": [6]}


def test_each_task_pays_for_its_inputs_in_the_common_layers(serve: Callable[..., Served]) -> None:
    served = serve("plain", "upper")
    charged: dict[Any, float] = {}
    thread = served.engine._worker
    thread.queue = SimpleNamespace(charge=charged.__setitem__)  # type: ignore[assignment]
    parts: list[Any] = [
        SimpleNamespace(task="a", tickets=[1] * 6, is_on_trunk=True),
        SimpleNamespace(task="b", tickets=[1] * 2, is_on_trunk=True),
        SimpleNamespace(task="c", tickets=[1] * 2, is_on_trunk=False),
    ]
    thread._charge(parts, [5.0, 1.0, 7.0], SimpleNamespace(seconds=4.0))  # type: ignore[arg-type]
    assert charged == {"a": 1 + 3, "b": 1 + 1, "c": 7}


def test_a_task_that_fails_does_not_harm_those_that_joined_its_pass(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("plain", "upper")
    broken = served.engine.task("plain").backbone
    original = revmux.serving.model_thread.run_pass

    def run_pass_or_fail(backbone: Any, *arguments: Any) -> Any:
        if backbone is broken:
            raise ZeroDivisionError("broken")
        return original(backbone, *arguments)

    monkeypatch.setattr("revmux.serving.model_thread.run_pass", run_pass_or_fail)
    futures = served.queue("plain", "upper")
    served.engine.start()
    served.engine.close()
    assert all(isinstance(future.exception(60), InferenceFailed) for future in futures["plain"])
    assert all(future.result(60).width == 2 for future in futures["upper"])
    assert served.batches == {"plain": [], "upper": [4]}
