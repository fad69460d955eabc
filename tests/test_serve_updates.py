"""Changing the tasks and adapters of a replica while it serves."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from polling import wait_until
from serving_http import TOPICS, figures, held_in_a_pass, listening, post
from serving_models import load, plain_scores, write_adapter, write_identifying_model, write_stage

from serve_app.config import AppConfig, LiveConfig, TaskConfig
from serve_app.service import Service
from serve_app.web import create_app


@pytest.fixture
def held(serving_tasks: dict[str, Any]) -> Iterator[tuple[Service, threading.Event]]:
    with held_in_a_pass(serving_tasks["mood"]) as found:
        yield found


@pytest.mark.parametrize("name", ["path", "field", "open inference", "unnamed"])
def test_a_request_in_flight_keeps_its_task_when_the_task_is_removed_or_replaced(
    serving_tasks: dict[str, Any], held: tuple[Service, threading.Event], name: str
) -> None:
    service, go_on = held  # serves mood under the name default
    body: dict[str, Any] = {"inputs": "w1 w2"}
    path = "/predict"
    if name == "path":
        path = "/tasks/default/predict"
    elif name == "field":
        body["task"] = "default"
    elif name == "open inference":
        path = "/v2/models/default/infer"
        body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1 w2"]}]}
    mood, topic = (TaskConfig.model_validate(serving_tasks[task]) for task in ("mood", "topic"))
    labels = set(service.engine.task().label_names)
    with listening(create_app(service)) as url, ThreadPoolExecutor(1) as client:
        reply = client.submit(post, url + path, body)
        wait_until(lambda: service.engine.stats()["waiting"] == 1)
        if name == "unnamed":
            service.update(_live({"default": mood, "second": topic}))
        else:
            service.update(_live({"renamed": topic}))
        assert service.update_error is None
        go_on.set()
        found = reply.result(60)
    assert found.status_code == 200, found.text
    content = found.json()
    given = content["outputs"][0]["data"] if name == "open inference" else [item["label"] for item in content]
    assert set(given) == labels
    assert labels.isdisjoint(TOPICS)


@pytest.mark.parametrize("error", [OSError("disk gone"), torch.OutOfMemoryError("CUDA out of memory."), KeyError("x")])
def test_a_failing_update_is_reported_and_the_server_keeps_running(
    serving_tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    mood, topic = (TaskConfig.model_validate(serving_tasks[task]) for task in ("mood", "topic"))
    config = AppConfig.model_validate(serving_tasks["mood"])
    service = Service(config)
    service.serve(config.served)

    def fail(*_: object, **__: object) -> None:
        raise error

    try:
        with monkeypatch.context() as patch:
            patch.setattr("serve_app.task_loading.load_pretrained", fail)
            service.update(_live({"default": mood, "second": topic}))
        assert type(error).__name__ in str(service.info()["update_error"])
        assert list(service.engine.tasks) == ["default"]
        assert service.engine.submit(["w1"])[0].result(60)
        service.update(_live({"default": mood, "second": topic}))
        assert service.update_error is None
        assert list(service.engine.tasks) == ["default", "second"]
    finally:
        service.close()


def test_an_adapter_that_was_trained_again_in_its_folder_is_loaded_by_the_next_update(
    serving_tasks: dict[str, Any], tmp_path: Path
) -> None:
    """Its metrics contain a NaN, which JSON does not have."""
    model = Path(serving_tasks["topic"]["model"])
    folder = tmp_path / "adapter"
    shutil.copytree(write_adapter(tmp_path, load(model), 2), folder)
    task = TaskConfig.model_validate({"model": str(model), "adapters": [str(folder)]})
    service = Service(AppConfig.model_validate({"model": str(model), "adapters": [str(folder)]}))
    try:
        service.serve({"default": task})
        (first,) = service.engine.task().lineup.adapters
        service.update(_live({"default": task}))
        assert service.engine.task().lineup.adapters == (first,)
        recorded = json.loads((folder / "adapter_config.json").read_text())
        recorded["metrics"] = {"accuracy_mean": float("nan"), "siso_accuracy": 0.5}
        (folder / "adapter_config.json").write_text(json.dumps(recorded))
        service.update(_live({"default": task}))
        assert service.update_error is None
        assert service.engine.task().lineup.adapters != (first,)
        with listening(create_app(service)) as url:
            described = httpx.get(f"{url}/info", timeout=60).json()["tasks"]["default"]["adapters"][0]
        assert described["source"] == str(folder)
        assert described["metrics"] == {"accuracy_mean": None, "siso_accuracy": 0.5}
    finally:
        service.close()


def test_an_update_with_one_bad_adapter_changes_nothing(serving_tasks: dict[str, Any], tmp_path: Path) -> None:
    mood, topic = (TaskConfig.model_validate(serving_tasks[task]) for task in ("mood", "topic"))
    config = AppConfig.model_validate({"tasks": {"mood": mood.model_dump()}})
    service = Service(config)
    service.serve(config.served)
    better = str(write_adapter(tmp_path, load(Path(mood.model)), 2, prefill_layers=2))
    other_model = write_identifying_model(_made(tmp_path / "other"), seed=1)[0]
    bad = str(write_adapter(tmp_path, load(other_model), 4))
    try:
        before = service.info()["tasks"]
        for change in (
            {"mood": mood.model_copy(update={"adapters": [better, bad]})},
            {
                "mood": mood.model_copy(update={"adapters": [better]}),
                "other": topic.model_copy(update={"adapters": [bad]}),
            },
            {"mood": mood, "first": topic, "second": topic.model_copy(update={"model": str(tmp_path)})},
        ):
            service.update(_live(change))
            assert service.update_error is not None
            assert service.info()["tasks"] == before
        service.update(_live({"mood": mood.model_copy(update={"adapters": [better]}), "topic": topic}))
        assert service.update_error is None
        found = service.info()["tasks"]
        assert [adapter["prefill_layers"] for adapter in found["mood"]["adapters"]] == [2]
        assert list(found) == ["mood", "topic"]
    finally:
        service.close()


def test_a_ladder_is_served_reported_and_updated_as_a_whole(serving_tasks: dict[str, Any], tmp_path: Path) -> None:
    model = Path(serving_tasks["mood"]["model"])
    pretrained = load(model)
    head = str(write_stage(tmp_path, pretrained, 1, 1, 1, 1.0, method="exit-head", layer=1))
    pairs, four = (str(write_stage(tmp_path / str(width), pretrained, 2, width, 2)) for width in (2, 4))
    config = AppConfig.model_validate({"model": str(model), "adapters": [pairs, head], "plain_load": 0})
    service = Service(config)
    service.serve(config.served)
    batch = {"inputs": [["w1"], ["w2 w3"], ["w4"], ["w5 w6 w7"]]}

    def update(*adapters: str) -> list[int]:
        service.update(_live({"default": config.served["default"].model_copy(update={"adapters": list(adapters)})}))
        return [adapter["num_inputs"] for adapter in service.info()["tasks"]["default"]["adapters"]]

    try:
        with listening(create_app(service)) as url:
            answered = post(f"{url}/predict", batch).headers
            assert answered["x-revmux-stage"] == "2,2,2,2"
            assert answered["x-revmux-width"] == "2,2,2,2"
            assert answered["x-revmux-method"] == ",".join(["token-split"] * 4)
            assert post(f"{url}/predict", {**batch, "max_multiplex": 1}).headers["x-revmux-stage"] == "0,0,0,0"
            counted = figures(url)
            assert counted["revmux_ladder_inputs_total", "2", "default"] == 4
            assert counted["revmux_ladder_inputs_total", "0", "default"] == 4
            described = httpx.get(f"{url}/info").json()["tasks"]["default"]["adapters"]
            assert [(one["source"], one["stage"], one["threshold"], one["used"]) for one in described] == [
                (head, 1, 1.0, True),
                (pairs, 2, 0.0, True),
            ]
            assert update(pairs) == [1, 2]
            assert "no adapter serves stage 1" in str(service.update_error)
            assert update(head, pairs, four) == [1, 2]
            assert "both serve stage 2" in str(service.update_error)
            assert update(head, four) == [1, 4]
            assert service.update_error is None
            assert post(f"{url}/predict", batch).headers["x-revmux-width"] == "4,4,4,4"
            assert update(head) == [1]
            assert post(f"{url}/predict", batch).headers["x-revmux-stage"] == "0,0,0,0"
    finally:
        service.close()


def test_adapters_and_tasks_can_be_changed_while_requests_are_answered(
    serving_tasks: dict[str, Any], tmp_path: Path
) -> None:
    mood, topic = (TaskConfig.model_validate(serving_tasks[name]) for name in ("mood", "topic"))
    narrow = mood.model_copy(update={"adapters": mood.adapters[:1]})
    config = AppConfig.model_validate({"tasks": {"mood": narrow.model_dump()}, "plain_load": 0})
    service = Service(config)
    service.serve(config.served)
    expected = plain_scores(load(Path(mood.model)), ["w1 w2"])[0].softmax(-1)
    stop, failures, answered = threading.Event(), [], [0]

    def ask(url: str) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                reply = client.post(f"{url}/tasks/mood/predict", json={"inputs": [["w1 w2"]] * 4})
                if reply.status_code != 200 or reply.json()[0][0]["score"] != pytest.approx(
                    expected.max().item(), abs=1e-3
                ):
                    failures.append(reply.text)
                answered[0] += 1

    def widths(url: str) -> Any:
        return httpx.get(f"{url}/info").json()["tasks"]["mood"]["group_widths"]

    try:
        with listening(create_app(service)) as url:
            client = threading.Thread(target=ask, args=(url,))
            client.start()
            assert widths(url) == [1, 2]
            service.update(_live({"mood": mood, "topic": topic}))
            assert widths(url) == [1, 2, 4]
            assert post(f"{url}/tasks/topic/predict", {"inputs": "w1"}).status_code == 200
            service.update({"tusks": {}})
            assert "known keys: tasks" in httpx.get(f"{url}/info").json()["update_error"]
            bad = mood.model_copy(update={"adapters": [str(tmp_path)]})
            service.update(_live({"mood": bad}))
            assert "not an adapter folder" in httpx.get(f"{url}/info").json()["update_error"]
            assert widths(url) == [1, 2, 4]
            service.update(_live({"mood": mood.model_copy(update={"model": topic.model})}))
            assert "is already served with model" in httpx.get(f"{url}/info").json()["update_error"]
            replaced = [*mood.adapters[:1], str(write_adapter(tmp_path, load(Path(mood.model)), 4, prefill_layers=2))]
            service.update(_live({"mood": mood.model_copy(update={"adapters": replaced})}))
            assert service.update_error is None
            info = httpx.get(f"{url}/info").json()
            assert [adapter["prefill_layers"] for adapter in info["tasks"]["mood"]["adapters"]] == [1, 2]
            assert post(f"{url}/tasks/topic/predict", {"inputs": "w1"}).status_code == 404
            service.update(_live({"mood": narrow}))
            assert widths(url) == [1, 2]
            stop.set()
            client.join()
    finally:
        stop.set()
        service.close()
    assert not failures
    assert answered[0] > 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _live(tasks: dict[str, TaskConfig]) -> dict[str, Any]:
    """The configuration as Serve passes it to a replica."""
    return LiveConfig(tasks=tasks).model_dump()
