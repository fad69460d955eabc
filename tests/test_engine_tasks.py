"""Several tasks on one engine: shared weights, separate queue limits and order, and requests that name a task."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving_models import load, plain_scores, text, write_adapter, write_identifying_model, write_model

from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Draining, Engine, Expired, InferenceFailed, Limits, Overloaded, PassReport, UnknownTask
from revmux.serving.shared_weights import WeightPool

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two task models that share everything but the head."""
    root = tmp_path_factory.mktemp("tasks")
    made = {"plain": root / "plain", "named": root / "named"}
    for folder in made.values():
        folder.mkdir()
    write_model(made["plain"])
    write_identifying_model(made["named"], seed=1)
    return made


@pytest.fixture
def models(folders: dict[str, Path]) -> dict[str, Pretrained]:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture
def engine(models: dict[str, Pretrained], tmp_path: Path) -> Iterator[Engine]:
    """An engine with two tasks that is not started, so that a test can fill the queue first."""
    made = Engine(limits=Limits(max_queue=60))
    for name, pretrained in models.items():
        made.add_task(name, pretrained, [write_adapter(tmp_path / name, pretrained, width) for width in (2, 4)])
    yield made
    made.close()


def test_each_task_answers_with_its_own_head_and_labels(engine: Engine, folders: dict[str, Path]) -> None:
    futures = {name: engine.submit(TEXTS, task=name) for name in folders}
    engine.start()
    for name, folder in folders.items():
        answers = [future.result(60) for future in futures[name]]
        found = torch.stack([answer.scores for answer in answers])
        torch.testing.assert_close(
            found, plain_scores(load(folder), TEXTS), atol=0.05 if name == "named" else 1e-3, rtol=0
        )
        assert 4 in {answer.width for answer in answers}
        assert found.shape[1] == len(engine.task(name).label_names)


def test_without_load_every_task_is_answered_bit_for_bit_as_by_its_model(
    engine: Engine, folders: dict[str, Path]
) -> None:
    engine.start()
    for name, folder in folders.items():
        answer = engine.submit([TEXTS[3]], task=name)[0].result(60)
        assert answer.width == 1
        assert torch.equal(answer.scores, plain_scores(load(folder), [TEXTS[3]])[0])


def test_weights_common_to_several_tasks_are_kept_once(engine: Engine) -> None:
    one, other = (engine.task(name).backbone for name in ("plain", "named"))
    places = {name: tensor.data_ptr() for name, tensor in one.named_parameters()}
    own = {name for name, tensor in other.named_parameters() if tensor.data_ptr() != places[name]}
    assert own == {"model.classifier.weight", "model.classifier.bias"}


def test_only_equal_weights_are_shared(models: dict[str, Pretrained]) -> None:
    one, other = (pretrained.backbone.freeze() for pretrained in models.values())
    with torch.no_grad():
        other.layer(2).output.dense.bias[0] += 1
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*other.parameters(), *other.buffers()))
    kept = [*other.model.classifier.parameters(), other.layer(2).output.dense.bias]
    pool = WeightPool()
    assert pool.share(one) == 0
    assert pool.share(other) == total - sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert not torch.equal(other.layer(2).output.dense.bias, one.layer(2).output.dense.bias)


def test_an_unknown_task_is_refused_with_the_known_ones(engine: Engine) -> None:
    with pytest.raises(UnknownTask, match="unknown task 'mood'; known tasks: named, plain") as caught:
        engine.submit(["w1"], task="mood")
    assert caught.value.known == ["named", "plain"]
    with pytest.raises(UnknownTask, match="no task is named; known tasks: named, plain"):
        engine.submit(["w1"])
    with pytest.raises(UserError, match="'plain' is already served"):
        engine.add_task("plain", engine.task("plain").pretrained)


def test_a_task_that_floods_the_queue_leaves_places_and_passes_to_the_other_task(engine: Engine) -> None:
    flood = engine.submit(TEXTS, task="plain") + engine.submit(TEXTS[:20], task="plain")
    with pytest.raises(Overloaded):
        engine.submit(["w1"], task="plain")
    order: list[str] = []
    late = engine.submit(["w1"], task="named", max_multiplex=1)
    late[0].add_done_callback(lambda future: order.append("named"))
    for future in flood:
        future.add_done_callback(lambda future: order.append("plain"))
    engine.start()
    engine.close()
    assert len(order) == 61
    assert order.index("named") < 60  # before all inputs of the other task were done
    stats = engine.stats()["tasks"]
    assert stats["plain"]["rejected"] == 1
    assert stats["named"]["rejected"] == 0


def test_a_removed_task_refuses_new_requests_and_answers_waiting_ones(engine: Engine) -> None:
    waiting = engine.submit(TEXTS[:5], task="named")
    engine.remove_task("named")
    with pytest.raises(UnknownTask, match="known tasks: plain"):
        engine.submit(["w1"], task="named")
    assert engine.stats()["waiting"] == 5
    engine.start()
    assert all(future.result(60).scores.shape == (28,) for future in waiting)
    assert engine.submit(["w1"])[0].result(60).scores.shape == (
        3,
    )  # only one task is left, so requests need not name it


def test_a_task_can_be_added_while_others_are_served(engine: Engine, folders: dict[str, Path]) -> None:
    engine.start()
    futures = engine.submit(TEXTS, task="plain")
    engine.add_task("second", load(folders["named"]))
    futures += engine.submit(TEXTS[:9], task="second")
    assert {len(future.result(60).scores) for future in futures} == {3, 28}


def test_priorities_order_requests_and_are_bounded(engine: Engine) -> None:
    order: list[str] = []
    small = Engine(engine.task("plain").pretrained, limits=Limits(max_batch=1))
    for name, priority in (("low", -2), ("usual", 0), ("high", 5.5)):
        small.submit(["w1"], priority=priority)[0].add_done_callback(lambda future, name=name: order.append(name))
    with pytest.raises(UserError, match=r"priority is 11; choose -10\.\.10"):
        small.submit(["w1"], priority=11)
    with pytest.raises(UserError, match="priority is nan"):
        small.submit(["w1"], priority=float("nan"))
    small.start()
    small.close()
    assert order == ["high", "usual", "low"]


def test_an_expired_request_fails_with_a_deadline_error_and_is_not_computed(engine: Engine) -> None:
    late = engine.submit(TEXTS[:3], task="plain", timeout=1e-9)
    timely = engine.submit(TEXTS[:3], task="plain", timeout=600)
    engine.start()
    for future in late:
        with pytest.raises(Expired, match="the deadline passed"):
            future.result(60)
    assert all(future.result(60) for future in timely)
    stats = engine.stats()
    assert stats["expired"] == 3
    assert sum(stats["inputs"].values()) == 3
    with pytest.raises(UserError, match="timeout is 0 s"):
        engine.submit(["w1"], task="plain", timeout=0)
    with pytest.raises(Expired):
        asyncio.run(engine.answer(["w1"], task="plain", timeout=1e-9))


def test_every_task_can_be_probed(engine: Engine) -> None:
    probes = [engine.probe("plain"), engine.probe("named")]
    assert engine.probe() is probes[0]
    engine.start()
    assert [len(probe.result(60).scores) for probe in probes] == [3, 28]
    with pytest.raises(UnknownTask):
        engine.probe("mood")
    with pytest.raises(UnknownTask, match="known tasks: none"):
        Engine().probe()


def test_counts_and_reports_match_what_was_computed(models: dict[str, Pretrained], tmp_path: Path) -> None:
    pretrained = models["plain"]
    reports: list[PassReport] = []
    adapter = write_adapter(tmp_path, pretrained, 2)
    with Engine(pretrained, [adapter], Limits(plain_load=0), task="one", on_pass=reports.append) as engine:
        engine.submit([text(index) for index in (5, 6)], max_multiplex=1)[0].result(60)
        engine.submit([text(index) for index in range(6)])[-1].result(60)
    stats = engine.stats()
    own = stats["tasks"]["one"]
    assert own["requests"] == 2
    assert own["inputs"] == {1: 2, 2: 6}
    assert own["groups"] == {1: 2, 2: 3}
    assert own["passes"] == len(reports)
    assert own["tokens"] == sum(report.tokens for report in reports) == sum(n % 20 + 3 for n in (5, 6, *range(6)))
    assert own["padded_tokens"] == sum(report.padded_tokens for report in reports) >= own["tokens"]
    assert {"tokenize", "queue", "pad", "plain", "prefill", "multiplex", "upper", "head", "reply"} == set(
        own["seconds"]
    )
    assert [width for report in reports for width in report.widths].count(2) == 6
    for report in reports:
        assert sum(report.steps.values()) <= report.seconds
        assert len(report.queue_seconds) == len(report.widths)
    assert stats["waiting"] == 0
    assert {key: value for key, value in stats.items() if key != "tasks"} == own  # the only task


def test_a_failing_report_loses_no_answer(models: dict[str, Pretrained]) -> None:
    def broken(report: PassReport) -> None:
        raise ZeroDivisionError

    with Engine(models["plain"], on_pass=broken) as engine:
        assert engine.submit(["w1"])[0].result(60).width == 1
        assert engine.submit(["w2"])[0].result(60).width == 1


def test_a_failing_task_does_not_harm_the_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    futures = {name: engine.submit(TEXTS[:9], task=name) for name in ("plain", "named")}
    monkeypatch.setattr(engine.task("plain").backbone, "run", lambda *_: 1 / 0)
    engine.start()
    assert all(isinstance(future.exception(60), InferenceFailed) for future in futures["plain"])
    assert all(future.result(60) for future in futures["named"])
    assert engine.stats()["tasks"]["plain"]["failed"] == 9


def test_the_memory_of_a_removed_task_is_released(engine: Engine) -> None:
    engine.start()
    engine.probe("named").result(60)
    engine.submit(TEXTS[:9], task="named")[-1].result(60)
    gone = weakref.ref(engine.remove_task("named"))
    engine.submit(TEXTS[:9], task="plain")[-1].result(60)  # the model is busy with something else now
    gc.collect()
    assert gone() is None


def test_closing_without_draining_fails_the_waiting_requests_of_every_task(engine: Engine) -> None:
    futures = engine.submit(TEXTS[:3], task="plain") + engine.submit(TEXTS[:3], task="named")
    engine.close(drain=False)
    assert all(isinstance(future.exception(0), Draining) for future in futures)
