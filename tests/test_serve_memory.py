"""Tasks that are loaded on first use and removed, least recently used first, when memory is limited."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_http import listening
from serving_models import plain_scores
from tiny_models import write_tiny_model

import serve_app.task_loading
from revmux.errors import UserError
from revmux.estimate.peak import StorageCounter
from revmux.estimate.serving_memory import kept_memory
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Task
from serve_app.config import AppConfig, LiveConfig, TaskConfig
from serve_app.errors import Unhealthy
from serve_app.service import Service
from serve_app.web import create_app

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models that have nothing in common."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(root / name, seed) for seed, name in enumerate(NAMES)}


def configured(folders: dict[str, Path], tasks: float) -> AppConfig:
    """A configuration whose memory has room for this many of the models."""
    one = kept_memory(load_short(folders["a"]).backbone, []).total
    served = {name: {"model": str(folder), "max_length": 16} for name, folder in folders.items()}
    return AppConfig.model_validate({"tasks": served, "memory_gb": tasks * one / 1e9})


def load_short(folder: Path) -> Pretrained:
    return load_pretrained(BackboneConfig(model=str(folder), max_length=16))


@pytest.fixture
def service(folders: dict[str, Path]) -> Iterator[Service]:
    config = configured(folders, 2.5)
    made = Service(config)
    made.serve(config.served)
    yield made
    made.close()


def test_the_task_that_was_not_used_for_longest_makes_room(service: Service, folders: dict[str, Path]) -> None:
    assert list(service.engine.tasks) == ["a", "b"]
    with listening(create_app(service)) as url:

        def ask(names: Any, key: str = "task") -> httpx.Response:
            body = {"inputs": "w1 w2", key: names, "raw_scores": True}
            return httpx.post(f"{url}/predict", json=body, timeout=60)

        for name, left in (("a", {"a", "b"}), ("c", {"a", "c"}), ("a", {"a", "c"}), ("b", {"a", "b"})):
            found = {item["label"]: item["score"] for item in ask(name).json()}
            expected = plain_scores(load_short(folders[name]), ["w1 w2"])[0]
            assert [found["bad"], found["good"]] == pytest.approx(expected.tolist(), abs=1e-5)
            assert set(service.engine.tasks) == left
        info = httpx.get(f"{url}/info").json()
        assert (set(info["tasks"]), info["not_loaded"]) == ({"a", "b"}, ["c"])
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == list(NAMES)
        assert httpx.get(f"{url}/v2/models/c/ready", timeout=60).status_code == 200
        refused = ask("d")
        assert (refused.status_code, refused.json()["error"]) == (404, "unknown task 'd'; known tasks: a, b, c")
        before = set(service.engine.tasks)
        assert ask([*NAMES, "d"], "tasks").status_code == 404
        assert set(service.engine.tasks) == before  # refused before anything is loaded
        assert set(ask(["b", "c"], "tasks").json()) == {"b", "c"}
        refused = ask("*", "tasks")
        assert refused.status_code == 422
        assert "the 3 tasks do not fit into memory_gb" in refused.json()["error"]


def test_requests_for_one_task_wait_for_the_same_load(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    original, loads = serve_app.task_loading.load_pretrained, []
    monkeypatch.setattr(
        serve_app.task_loading,
        "load_pretrained",
        lambda config, **options: loads.append(config) or original(config, **options),
    )

    async def ask() -> list[Any]:
        return await asyncio.gather(*(service.tasks.get("c") for _ in range(8)))

    assert len(set(asyncio.run(ask()))) == 1
    assert len(loads) == 1


def test_a_request_that_names_several_tasks_keeps_them_while_others_load(service: Service) -> None:
    wanted = [("a", "c"), ("b", "c"), ("a", "b")]

    async def ask() -> list[list[Task]]:
        return await asyncio.gather(*(service.tasks.several(names) for names in wanted))

    found = asyncio.run(ask())
    assert [tuple(task.name for task in tasks) for tasks in found] == wanted
    assert len(service.engine.tasks) == 2
    for tasks in found:
        answers = asyncio.run(service.engine.answer_tasks(["w1"], tasks))
        assert all(torch.isfinite(answer.scores).all() for [answer] in answers)


def test_a_task_that_was_removed_for_another_answers_the_request_that_holds_it(service: Service) -> None:
    held = asyncio.run(service.tasks.get("b"))
    asyncio.run(service.tasks.get("a"))
    asyncio.run(service.tasks.get("c"))
    assert "b" not in service.engine.tasks
    answers = asyncio.run(service.engine.answer(["w1"], task=held))
    assert torch.isfinite(answers[0].scores).all()


def test_a_task_that_cannot_be_loaded_harms_no_other(
    service: Service, folders: dict[str, Path], tmp_path: Path
) -> None:
    tasks = service.config.served | {"broken": TaskConfig(model=str(tmp_path))}
    del tasks["c"]
    service.update(LiveConfig(tasks=tasks).model_dump())
    assert service.update_error is None
    with pytest.raises(Unhealthy, match=r"task 'broken' cannot be loaded: folder .* contains no config\.json"):
        asyncio.run(service.tasks.get("broken"))
    assert asyncio.run(service.tasks.get("a")) is service.engine.task("a")
    assert asyncio.run(service.tasks.get("b")) is service.engine.task("b")
    only = Service(service.config)
    with pytest.raises(UserError, match=r"contains no config\.json"):
        only.serve({"broken": tasks["broken"]})
    only.close()


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyError("x")])
def test_a_task_that_fails_unexpectedly_harms_no_other(
    service: Service, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    load = serve_app.task_loading.load_pretrained

    def fail(config: BackboneConfig, *arguments: Any, **named: Any) -> Pretrained:
        if config.model == str(folders["a"]):
            raise error
        return load(config, *arguments, **named)

    monkeypatch.setattr("serve_app.task_loading.load_pretrained", fail)
    fresh = Service(service.config)
    fresh.serve(service.config.served)
    assert list(fresh.engine.tasks) == ["b", "c"]
    with pytest.raises(Unhealthy, match="task 'a' cannot be loaded"):
        asyncio.run(fresh.tasks.get("a"))
    fresh.close()


def test_an_update_of_which_no_task_can_be_loaded_changes_nothing(
    service: Service, folders: dict[str, Path], tmp_path: Path
) -> None:
    service.update(LiveConfig(tasks={"broken": TaskConfig(model=str(tmp_path))}).model_dump())
    assert "contains no config.json" in str(service.update_error)
    assert service.task_names == list(NAMES)
    assert list(service.engine.tasks) == ["a", "b"]
    service.update(
        LiveConfig(tasks={"broken": TaskConfig(model=str(tmp_path)), "new": service.config.served["c"]}).model_dump()
    )
    assert service.update_error is None
    assert list(service.engine.tasks) == ["new"]
    assert service.tasks.memory.total <= 1e9 * service.config.memory_gb  # type: ignore[operator]


def test_a_task_that_is_not_loaded_cannot_get_another_model_either(service: Service, folders: dict[str, Path]) -> None:
    assert service.tasks.not_loaded == ["c"]
    tasks = service.config.served | {"c": service.config.served["a"]}
    service.update(LiveConfig(tasks=tasks).model_dump())
    assert "task 'c' is already served with model" in str(service.update_error)


def test_a_refused_request_loads_no_task(service: Service) -> None:
    with listening(create_app(service)) as url:
        for path, body, status in (
            ("/predict", {"task": "c", "inputs": 7}, 422),
            ("/predict", {"task": "c", "inputs": []}, 400),
            ("/predict", {"task": "c", "inputs": [["w1"]] * (service.config.max_texts + 1)}, 413),
            ("/v2/models/c/infer", {"inputs": []}, 422),
            ("/classify", {"model": "c", "input": []}, 400),
        ):
            reply = httpx.post(f"{url}{path}", json=body, timeout=60)
            assert reply.status_code == status, (path, body, reply.text)
    assert service.tasks.not_loaded == ["c"]


def test_without_a_limit_all_tasks_are_loaded_at_the_start(folders: dict[str, Path]) -> None:
    config = configured(folders, 1).model_copy(update={"memory_gb": None})
    made = Service(config)
    made.serve(config.served)
    assert list(made.engine.tasks) == list(NAMES)
    made.close()


def test_a_task_that_is_larger_than_the_limit_is_served_alone_with_a_warning(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(folders, 0.5)
    made = Service(config)
    made.serve(config.served)
    assert list(made.engine.tasks) == ["a"]
    assert "task 'a' alone takes" in caplog.text
    made.close()


def test_weights_that_are_shared_count_once(folders: dict[str, Path]) -> None:
    one, other = load_short(folders["a"]).backbone, load_short(folders["b"]).backbone
    counter = StorageCounter()
    alone = kept_memory(one, [], counter).total
    assert alone == sum(tensor.numel() * tensor.element_size() for tensor in (*one.parameters(), *one.buffers()))
    assert kept_memory(one, [], counter).total == 0
    assert kept_memory(other, [], counter).total == alone
