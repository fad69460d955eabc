"""The HTTP interface of one replica, in this process: tasks, headers, errors, and the page that documents it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from serving_http import TOPICS, USUAL, figures, listening, post, serving

import serve_app.examples
from revmux.serving import Answer
from serve_app.config import AppConfig
from serve_app.headers import MOST_LISTED, reply_headers
from serve_app.service import Service
from serve_app.web import create_app


@pytest.fixture(scope="module")
def url(serving_tasks: dict[str, Any]) -> Iterator[str]:
    with serving({"tasks": serving_tasks, **USUAL}) as service, listening(create_app(service)) as base:
        yield base


def test_a_task_is_selected_by_path_or_by_field(url: str) -> None:
    by_path = post(f"{url}/tasks/topic/predict", {"inputs": "w1 w2"})
    by_field = post(f"{url}/predict", {"inputs": "w1 w2", "task": "topic"})
    assert by_path.json() == by_field.json()
    assert {item["label"] for item in by_path.json()} == set(TOPICS)
    other = post(f"{url}/predict", {"inputs": "w1 w2", "task": "mood"})
    assert {item["label"] for item in other.json()} == {"LABEL_0", "LABEL_1", "LABEL_2"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"inputs": "w1"}),
        ("/predict", {"inputs": "w1", "task": "weather"}),
        ("/tasks/weather/predict", {"inputs": "w1"}),
        ("/v2/models/weather/infer", {"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": ["w1"]}]}),
    ],
)
def test_an_unknown_task_gets_404_with_the_known_ones(url: str, path: str, body: Any) -> None:
    reply = post(url + path, body)
    assert (reply.status_code, reply.json()["error_type"]) == (404, "unknown_task")
    assert reply.json()["error"].endswith("known tasks: mood, topic")


def test_a_path_and_a_field_must_not_contradict_each_other(url: str) -> None:
    reply = post(f"{url}/tasks/mood/predict", {"inputs": "w1", "task": "topic"})
    assert reply.status_code == 422
    assert "topic" in reply.json()["error"]


def test_one_request_can_ask_several_tasks(url: str) -> None:
    for inputs in ("w1 w2", [["w1 w2"], ["w3", "w4"]]):
        body = {"inputs": inputs, "max_multiplex": 1}
        found = post(f"{url}/predict", {**body, "tasks": ["topic", "mood"]})
        assert list(found.json()) == ["topic", "mood"]
        for task, answer in found.json().items():
            assert answer == post(f"{url}/predict", {**body, "task": task}).json()
        assert post(f"{url}/predict", {**body, "tasks": "*"}).json() == found.json()
        texts = 1 if isinstance(inputs, str) else len(inputs)
        assert found.headers["x-revmux-method"] == ",".join(["siso"] * 2 * texts)
    shared = figures(url)["revmux_shared_prefill_total", "mood"] + figures(url)["revmux_shared_prefill_total", "topic"]
    assert shared >= 6  # of each of the four requests, one task ran the layers of both


@pytest.mark.parametrize(
    ("path", "names", "status", "message"),
    [
        ("/predict", {"tasks": ["mood", "weather"]}, 404, "unknown task 'weather'; known tasks: mood, topic"),
        ("/predict", {"tasks": ["mood", "mood"]}, 422, "task 'mood' is named twice"),
        ("/predict", {"tasks": []}, 422, "tasks"),
        ("/predict", {"tasks": "mood"}, 422, "tasks"),
        ("/predict", {"tasks": "*", "task": "mood"}, 422, "names the task 'mood' and also tasks"),
        ("/tasks/mood/predict", {"tasks": "*"}, 422, "names the task 'mood' and also tasks"),
    ],
)
def test_a_request_that_asks_several_tasks_names_them_clearly(
    url: str, path: str, names: dict[str, Any], status: int, message: str
) -> None:
    reply = post(url + path, {"inputs": "w1", **names})
    assert reply.status_code == status
    assert message in reply.json()["error"]


def test_headers_of_a_long_reply_do_not_list_its_answers() -> None:
    answers = [Answer(torch.zeros(2), 1, "siso", 0.0, 0.0)] * (MOST_LISTED + 1)
    names = [{name for name, _ in reply_headers(["w1"], found, 0.0, "cpu")} for found in (answers[1:], answers)]
    assert names[0] - names[1] == {name for name in names[0] if name.startswith(b"x-revmux-")} != set()


def test_headers_report_how_each_input_was_computed(url: str) -> None:
    batch = {"inputs": [["w1"], ["w2 w3"], ["w4"], ["w5 w6 w7"]], "task": "topic"}
    grouped = post(f"{url}/predict", batch).headers
    assert grouped["x-revmux-width"] == "2,2,2,2"
    assert grouped["x-revmux-method"] == ",".join(["token-split"] * 4)
    groups = grouped["x-revmux-group"].split(",")
    assert sorted(groups) == ["1", "1", "2", "2"]
    assert grouped["x-revmux-fallback"] == grouped["x-revmux-truncated"] == "false,false,false,false"
    assert grouped["x-compute-tokens"] == str(3 + 4 + 3 + 5)
    assert grouped["x-compute-characters"] == str(2 + 5 + 2 + 8)
    assert grouped["x-compute-type"] == "cpu"
    times = {name: float(grouped[f"x-{name}-time"]) for name in ("total", "tokenization", "queue", "inference")}
    assert times["total"] >= times["inference"] > 0
    alone = post(f"{url}/predict", {**batch, "max_multiplex": 1}).headers
    assert alone["x-revmux-width"] == "1,1,1,1"
    assert alone["x-revmux-method"] == "siso,siso,siso,siso"
    assert alone["x-revmux-group"] == "1,2,3,4"


def test_an_answer_below_the_threshold_falls_back_and_the_reply_reports_it(serving_tasks: dict[str, Any]) -> None:
    config = AppConfig.model_validate({**serving_tasks["mood"], "plain_load": 0, "threshold": 1.0})
    service = Service(config)
    service.serve(config.served)
    try:
        with listening(create_app(service)) as url:
            reply = post(f"{url}/predict", {"inputs": [["w1"], ["w2 w3"]], "raw_scores": True})
            assert reply.headers["x-revmux-fallback"] == "true,true"
            assert reply.headers["x-revmux-width"] == "2,2"
            counted = figures(url)
            assert counted["revmux_fell_back_total", "default"] == 2
    finally:
        service.close()


def test_a_deadline_that_expires_in_the_queue_gets_504(url: str) -> None:
    reply = post(f"{url}/tasks/mood/predict", {"inputs": [["w1"]] * 64, "timeout_ms": 0.0001})
    assert (reply.status_code, reply.json()["error_type"]) == (504, "deadline")


def test_one_invalid_text_does_not_affect_other_requests(url: str) -> None:
    assert post(f"{url}/tasks/mood/predict", {"inputs": [["w1"], [""]]}).status_code == 400
    assert post(f"{url}/tasks/mood/predict", {"inputs": "w1"}).status_code == 200


def test_the_api_page_loads_nothing_from_other_servers(url: str) -> None:
    shown = httpx.get(f"{url}/docs").text
    assert "https://" not in shown
    assert httpx.get(f"{url}/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    schema = httpx.get(f"{url}/openapi.json").json()
    for path in ("/predict", "/tasks/{task}/predict", "/v2/models/{task}/infer"):
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert len(content["examples"]) >= 2
    assert "429" in schema["paths"]["/predict"]["post"]["responses"]


def test_the_examples_on_the_api_page_work(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert post(f"{url}/predict", serve_app.examples.SEVERAL_TASKS["all tasks"]).status_code == 200
    for path in ("/tasks/{task}/predict", "/v2/models/{task}/infer"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        for name, example in content["examples"].items():
            reply = post(url + path.replace("{task}", "mood"), example["value"])
            assert reply.status_code == 200, (name, reply.text)
