"""Open Inference and vLLM's classification answer as /predict does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving_http import TOPICS, USUAL, listening, post, serving

from serve_app.web import create_app


@pytest.fixture(scope="module")
def url(serving_tasks: dict[str, Any]) -> Iterator[str]:
    with serving({"tasks": serving_tasks, **USUAL}) as service, listening(create_app(service)) as base:
        yield base


def test_open_inference_answers_as_predict_does(url: str) -> None:
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    body = {"id": "7", "inputs": [{"name": "text", "shape": [3], "datatype": "BYTES", "data": texts}]}
    reply = post(f"{url}/v2/models/topic/infer", {**body, "parameters": {"max_multiplex": 1}})
    assert reply.status_code == 200
    assert (reply.json()["model_name"], reply.json()["id"]) == ("topic", "7")
    tensors = {output["name"]: output for output in reply.json()["outputs"]}
    assert tensors["labels"]["datatype"] == "BYTES"
    assert tensors["scores"]["datatype"] == "FP32"
    assert tensors["labels"]["shape"] == tensors["scores"]["shape"] == [3, 3]
    expected = post(f"{url}/tasks/topic/predict", {"inputs": [[part] for part in texts], "max_multiplex": 1}).json()
    assert tensors["labels"]["data"] == [item["label"] for ranking in expected for item in ranking]
    assert tensors["scores"]["data"] == pytest.approx([item["score"] for ranking in expected for item in ranking])


def test_vllms_classification_answers_as_predict_does(url: str) -> None:
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    reply = post(f"{url}/classify", {"model": "topic", "input": texts, "max_multiplex": 1})
    assert reply.status_code == 200
    found = reply.json()
    assert (found["object"], found["model"], len(found["data"])) == ("list", "topic", 3)
    expected = post(f"{url}/tasks/topic/predict", {"inputs": [[part] for part in texts], "max_multiplex": 1}).json()
    for index, (one, ranking) in enumerate(zip(found["data"], expected)):
        assert (one["index"], one["num_classes"], one["label"]) == (index, 3, ranking[0]["label"])
        by_label = {item["label"]: item["score"] for item in ranking}
        assert one["probs"] == pytest.approx([by_label[name] for name in TOPICS])
    usage = found["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == int(reply.headers["x-compute-tokens"])
    alone = post(f"{url}/classify", {"model": "mood", "input": "w1 w2"}).json()
    assert [item["index"] for item in alone["data"]] == [0]


def test_vllms_classification_names_tasks_as_models(url: str) -> None:
    models = httpx.get(f"{url}/v1/models").json()
    assert {model["id"] for model in models["data"]} == set(httpx.get(f"{url}/info").json()["tasks"])
    unknown = post(f"{url}/classify", {"model": "weather", "input": "w1"})
    assert (unknown.status_code, unknown.json()["error_type"]) == (404, "unknown_task")
    assert post(f"{url}/classify", {"model": "topic", "input": []}).status_code == 400
    assert post(f"{url}/classify", {"model": "topic", "input": "w1", "temperature": 0}).status_code == 422


def test_open_inference_accepts_pairs_and_returns_the_requested_outputs(url: str) -> None:
    pair = {"name": "text", "shape": [1, 2], "datatype": "BYTES", "data": [["w1 w2", "w3"]]}
    reply = post(
        f"{url}/v2/models/mood/infer", {"inputs": [pair], "outputs": [{"name": "labels"}], "parameters": {"top_k": 1}}
    )
    expected = post(f"{url}/tasks/mood/predict", {"inputs": ["w1 w2", "w3"]}).json()
    assert reply.json()["outputs"] == [
        {"name": "labels", "shape": [1, 1], "datatype": "BYTES", "data": [expected[0]["label"]]}
    ]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"shape": [3]}, 422),
        ({"shape": [1, 3], "data": ["a", "b", "c"]}, 422),
        ({"shape": [0], "data": []}, 400),
        ({"datatype": "FP32"}, 422),
        ({"data": [1, 2]}, 422),
        ({"data": ["w1", ""]}, 400),
        ({"unknown": 1}, 422),
    ],
)
def test_unsupported_tensors_are_refused(url: str, change: dict[str, Any], status: int) -> None:
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["w1", "w2"], **change}
    reply = post(f"{url}/v2/models/mood/infer", {"inputs": [tensor]})
    assert reply.status_code == status
    assert reply.json()["error"]


@pytest.mark.parametrize("shape", ["9" * 4299, "9" * 4301, "1" + "0" * 4000 + ", 2"])
def test_a_shape_of_thousands_of_digits_is_refused(url: str, shape: str) -> None:
    body = f'{{"inputs": [{{"name": "text", "shape": [{shape}], "datatype": "BYTES", "data": ["w1"]}}]}}'
    reply = httpx.post(f"{url}/v2/models/mood/infer", content=body, timeout=60)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")


def test_open_inference_serves_health_and_metadata(url: str) -> None:
    assert httpx.get(f"{url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{url}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{url}/v2").json()["name"] == "revmux"
    assert httpx.get(f"{url}/v2/models/topic/ready").json() == {"name": "topic", "ready": True}
    described = httpx.get(f"{url}/v2/models/topic").json()
    assert described["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [output["shape"] for output in described["outputs"]] == [[-1, 3], [-1, 3]]
