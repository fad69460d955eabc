"""The HTTP interface of one replica, in this process: protocols, tasks, tokens, limits, metrics, and fuzzing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from dashboard_queries import needed
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving_http import HOSTILE, TOPICS, listening, talk, write_tasks
from serving_models import load, plain_scores, text, write_adapter, write_identifying_model, write_stage

import serve_app.examples
from revmux.errors import UserError
from revmux.serving import Answer
from serve_app.auth import read_tokens
from serve_app.config import AppConfig, LiveConfig, TaskConfig
from serve_app.errors import Unhealthy
from serve_app.headers import MOST_LISTED, reply_headers
from serve_app.metrics import page
from serve_app.service import Service
from serve_app.web import HttpApplication, create_app


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def service(tasks: dict[str, Any]) -> Iterator[Service]:
    config = AppConfig.model_validate(
        {"tasks": tasks, "plain_load": 1, "max_texts": 64, "max_body_bytes": 100_000, "body_seconds": 0.4}
    )
    made = Service(config, "r1")
    made.serve(config.served)
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(service: Service) -> HttpApplication:
    return create_app(service)


@pytest.fixture(scope="module")
def url(app: HttpApplication) -> Iterator[str]:
    with listening(app) as base:
        yield base


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(url, json=body, timeout=60, **more)


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
        ("/v2/models/weather/infer", {"inputs": []}),
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
    shared = (
        _figures(url)["revmux_shared_prefill_total", "mood"] + _figures(url)["revmux_shared_prefill_total", "topic"]
    )
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
    answers = [Answer(torch.zeros(2), 1, 0.0, 0.0)] * (MOST_LISTED + 1)
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


def test_an_answer_below_the_threshold_falls_back_and_the_reply_reports_it(tasks: dict[str, Any]) -> None:
    config = AppConfig.model_validate({**tasks["mood"], "plain_load": 0, "threshold": 1.0})
    service = Service(config)
    service.serve(config.served)
    try:
        with listening(create_app(service)) as url:
            reply = post(f"{url}/predict", {"inputs": [["w1"], ["w2 w3"]], "raw_scores": True})
            assert reply.headers["x-revmux-fallback"] == "true,true"
            assert reply.headers["x-revmux-width"] == "2,2"
            figures = _figures(url)
            assert figures["revmux_fell_back_total", "default"] == 2
    finally:
        service.close()


def test_each_health_check_asks_the_next_task(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    original = service.engine.probe
    monkeypatch.setattr(service.engine, "probe", lambda task: asked.append(task) or original(task))
    for _ in range(4):
        asyncio.run(service.probe())
    assert asked[:2] == asked[2:]
    assert set(asked) == {"mood", "topic"}
    monkeypatch.setattr(service.engine.task("topic").backbone, "embed", lambda _: 1 / 0)
    failures = 0
    for _ in range(2):
        try:
            asyncio.run(service.probe())
        except Unhealthy:
            failures += 1
    assert failures == 1
    with pytest.raises(Unhealthy, match="the model of task 'topic' does not answer"):
        asyncio.run(service.probe("topic"))


@pytest.fixture
def held(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, threading.Event]]:
    """A service in a forward pass that continues once the event is set."""
    monkeypatch.setattr("serve_app.service.PROBE_SECONDS", 0.05)
    config = AppConfig.model_validate(tasks["mood"])
    service = Service(config)
    service.serve(config.served)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    service.engine.task().backbone.layer(0).register_forward_pre_hook(wait)
    future = service.engine.submit(["w1"])[0]
    assert inside.wait(60)
    try:
        yield service, go_on
    finally:
        go_on.set()
        assert future.result(60)
        service.close()


def test_a_model_in_a_long_pass_is_healthy(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held
    asyncio.run(service.probe())
    go_on.set()
    asyncio.run(service.probe())
    assert service.engine.silent_seconds < service.config.stuck_seconds


def test_a_stuck_model_is_unhealthy(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held
    service.config = service.config.model_copy(update={"stuck_seconds": 0.01})
    with pytest.raises(Unhealthy, match="neither begun nor ended a pass"):
        asyncio.run(service.probe())
    go_on.set()
    assert service.engine.probe().result(60)
    asyncio.run(service.probe())


def test_a_model_whose_thread_has_ended_is_unhealthy_at_once(
    tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AppConfig.model_validate(tasks["mood"])
    service = Service(config)
    service.serve(config.served)
    thread = service.engine._worker._thread
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(service.engine._queue, "charge", lambda *_: 1 / 0)  # a bug in our code that no pass would catch
    assert service.engine.submit(["w1"])[0].result(60)
    thread.join(60)
    with pytest.raises(Unhealthy, match="thread has ended"):
        asyncio.run(service.probe())
    service.close()


@pytest.mark.parametrize(("asked", "found"), [(None, "bfloat16"), ("float32", "float32")])
def test_the_model_has_the_dtype_that_its_adapters_were_trained_with(
    tasks: dict[str, Any], tmp_path: Path, asked: str | None, found: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tasks["topic"]["adapters"][0], folder)
    recorded = json.loads((folder / "adapter_config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "adapter_config.json").write_text(json.dumps(recorded))
    config = AppConfig.model_validate({"model": tasks["topic"]["model"], "adapters": [str(folder)], "dtype": asked})
    service = Service(config)
    expected_warning = pytest.warns(UserWarning, match="was trained on a bfloat16 backbone") if asked else nullcontext()
    try:
        with expected_warning:
            service.serve(config.served)
        assert service.info()["model_dtype"] == found
    finally:
        service.close()


def test_what_mlflow_downloads_is_removed_after_loading(
    tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    downloads = tmp_path / "downloads"
    downloads.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(downloads))
    # As with a remote artifact store: files are downloaded, not read in place.
    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", ArtifactRepository.download_artifacts)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("toy", artifact_location=str(tmp_path / "artifacts")))
    client.log_artifacts(run.info.run_id, tasks["topic"]["adapters"][0], "adapter")
    adapter = f"runs:/{run.info.run_id}/adapter"
    config = AppConfig.model_validate({"model": tasks["topic"]["model"], "adapters": [adapter]})
    service = Service(config)
    try:
        service.serve(config.served)
        assert [item["source"] for item in service.info()["adapters"]] == [adapter]
        assert list(downloads.iterdir()) == []
        both = {
            "mood": {**tasks["topic"], "adapters": [adapter]},
            "missing": {**tasks["topic"], "adapters": ["runs:/1/no"]},
        }
        service.update({"tasks": both})
        assert "runs:/1/no" in str(service.update_error)
        assert list(downloads.iterdir()) == []
    finally:
        service.close()


@pytest.mark.parametrize("kind", ["an error of the registry", "another error"])
def test_info_and_logs_show_no_password_of_the_registry(
    kind: str, tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    registry = "http://me:s3cret@127.0.0.1:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: registry)
    if kind == "another error":

        def fail(*_: object) -> Path:
            raise MemoryError(f"{registry} sent too much")

        monkeypatch.setattr("serve_app.task_loading.fetch_adapter", fail)
    config = AppConfig.model_validate(tasks["topic"])
    service = Service(config)
    try:
        service.update({"tasks": {"topic": {**tasks["topic"], "adapters": ["models:/reviews@champion"]}}})
        with listening(create_app(service)) as url:
            shown = httpx.get(f"{url}/info", timeout=60)
        assert "http://me:***@127.0.0.1:1" in shown.json()["update_error"]
        assert "s3cret" not in shown.text + caplog.text
    finally:
        service.close()


def _figures(url: str, **headers: str) -> dict[tuple[str, ...], float]:
    """Return the samples of /metrics by name and label values (sorted by label name, without the replica's)."""
    text = httpx.get(f"{url}/metrics", headers=headers, timeout=60).text
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "replica")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


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


def test_open_inference_serves_health_and_metadata(url: str) -> None:
    assert httpx.get(f"{url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{url}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{url}/v2").json()["name"] == "revmux"
    assert httpx.get(f"{url}/v2/models/topic/ready").json() == {"name": "topic", "ready": True}
    described = httpx.get(f"{url}/v2/models/topic").json()
    assert described["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [output["shape"] for output in described["outputs"]] == [[-1, 3], [-1, 3]]


@pytest.mark.parametrize("name", ["path", "field", "open inference", "unnamed"])
def test_a_request_in_flight_keeps_its_task_when_the_task_is_removed_or_replaced(
    tasks: dict[str, Any], held: tuple[Service, threading.Event], name: str
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
    mood, topic = (TaskConfig.model_validate(tasks[task]) for task in ("mood", "topic"))
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
    tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    mood, topic = (TaskConfig.model_validate(tasks[task]) for task in ("mood", "topic"))
    config = AppConfig.model_validate(tasks["mood"])
    service = Service(config)
    service.serve(config.served)

    def fail(*_: object) -> None:
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


@pytest.mark.parametrize(
    ("accuracy", "threshold", "level", "said"),
    [
        (0.811, None, "WARNING", "accuracy 81.1%, 10.4 points below the plain model (91.5%), more than 2"),
        (0.9, None, "INFO", "accuracy 90.0%, 1.5 points below the plain model (91.5%)"),
        (
            0.811,
            0.9,
            "INFO",
            "10.4 points below the plain model (91.5%), before inputs below confidence 0.9 go on",
        ),
        (None, None, "INFO", "its accuracy was not measured"),
        (float("nan"), None, "INFO", "its accuracy was not measured"),
    ],
)
def test_the_log_reports_the_cost_of_each_adapter_and_warns_above_the_limit(
    tasks: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    accuracy: float | None,
    threshold: float | None,
    level: str,
    said: str,
) -> None:
    folder = tmp_path / "adapter"
    model = Path(tasks["topic"]["model"])
    written = write_adapter(tmp_path, load(model), 2, method="revmux")
    shutil.copytree(written, folder)
    recorded = json.loads((folder / "adapter_config.json").read_text())
    recorded["metrics"] = {} if accuracy is None else {"accuracy_mean": accuracy, "siso_accuracy": 0.915}
    (folder / "adapter_config.json").write_text(json.dumps(recorded))
    config = AppConfig.model_validate({"model": str(model), "adapters": [str(folder)], "threshold": threshold})
    service = Service(config)
    try:
        with caplog.at_level("INFO", "serve_app"):
            service.serve(config.served)
    finally:
        service.close()
    (record,) = [record for record in caplog.records if record.name == "serve_app.measured_loss"]
    assert record.levelname == level
    assert f"adapter {str(folder)!r} (N = 2, revmux): " in record.getMessage()
    assert said in record.getMessage()
    if level == "WARNING":
        assert "Set a threshold for the fallback, or remove this adapter" in record.getMessage()


def test_an_adapter_that_was_trained_again_in_its_folder_is_loaded_by_the_next_update(
    tasks: dict[str, Any], tmp_path: Path
) -> None:
    """Its metrics contain a NaN, which JSON does not have."""
    model = Path(tasks["topic"]["model"])
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


@pytest.mark.parametrize("shape", ["9" * 4299, "9" * 4301, "1" + "0" * 4000 + ", 2"])
def test_a_shape_of_thousands_of_digits_is_refused(url: str, shape: str) -> None:
    body = f'{{"inputs": [{{"name": "text", "shape": [{shape}], "datatype": "BYTES", "data": ["w1"]}}]}}'
    reply = httpx.post(f"{url}/v2/models/mood/infer", content=body, timeout=60)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")


def test_an_update_with_one_bad_adapter_changes_nothing(tasks: dict[str, Any], tmp_path: Path) -> None:
    mood, topic = (TaskConfig.model_validate(tasks[task]) for task in ("mood", "topic"))
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


def test_a_ladder_is_served_reported_and_updated_as_a_whole(tasks: dict[str, Any], tmp_path: Path) -> None:
    model = Path(tasks["mood"]["model"])
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
            figures = _figures(url)
            assert figures["revmux_ladder_inputs_total", "2", "default"] == 4
            assert figures["revmux_ladder_inputs_total", "0", "default"] == 4
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


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_metrics_count_requests_groups_and_stages(url: str) -> None:
    before = _figures(url)
    batch = [[text(index)] for index in range(8)]
    post(f"{url}/tasks/mood/predict", {"inputs": batch})
    post(f"{url}/tasks/mood/predict", {"inputs": ""})
    after = _figures(url)
    gained = {key: value - before.get(key, 0) for key, value in after.items()}
    assert gained["revmux_http_requests_total", "/tasks/{task}/predict", "200"] == 1
    assert gained["revmux_http_requests_total", "/tasks/{task}/predict", "400"] == 1
    assert gained["revmux_inputs_total", "mood", "4"] == 8
    assert gained["revmux_groups_total", "mood", "4"] == 2
    assert gained["revmux_group_width_bucket", "4.0", "mood"] == gained["revmux_group_width_count", "mood"] == 2
    assert gained["revmux_group_width_bucket", "2.0", "mood"] == 0
    assert gained["revmux_tokens_total", "mood"] > 8
    assert gained["revmux_stage_seconds_count", "tokenize", "mood"] == 8
    assert gained["revmux_stage_seconds_count", "upper", "mood"] >= 1
    assert gained["revmux_queue_inputs", "mood"] == 0
    assert after["revmux_queue_limit",] == 512


def test_every_metric_and_label_of_the_dashboard_is_exported(url: str) -> None:
    post(f"{url}/tasks/mood/predict", {"inputs": [[text(index)] for index in range(8)]})
    shown = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    exported = {sample.name: set(sample.labels) for family in shown for sample in family.samples}
    wanted = needed()
    assert len(wanted) > 15
    missing = {name: labels - exported.get(name, set()) for name, labels in wanted.items()}
    assert wanted.keys() <= exported.keys()
    assert not any(missing.values()), missing


def test_the_metrics_of_several_replicas_are_merged_into_one_page(service: Service) -> None:
    text = page({"b": service.metrics.families(), "a": service.metrics.families()}).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        replicas = [sample.labels["replica"] for sample in family.samples]
        assert replicas.count("a") == replicas.count("b") > 0
    assert text.count("# TYPE revmux_queue_inputs gauge") == 1


def test_a_deadline_that_expires_in_the_queue_gets_504(url: str) -> None:
    reply = post(f"{url}/tasks/mood/predict", {"inputs": [["w1"]] * 64, "timeout_ms": 0.0001})
    assert (reply.status_code, reply.json()["error_type"]) == (504, "deadline")


def test_one_invalid_text_does_not_affect_other_requests(url: str) -> None:
    assert post(f"{url}/tasks/mood/predict", {"inputs": [["w1"], [""]]}).status_code == 400
    assert post(f"{url}/tasks/mood/predict", {"inputs": "w1"}).status_code == 200


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_a_json_error_and_the_server_keeps_running(url: str, name: str) -> None:
    body, status = HOSTILE[name]
    reply = httpx.post(f"{url}/tasks/mood/predict", content=body, timeout=60)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    if status != 200:
        assert set(reply.json()) == {"error", "error_type"}
        assert len(reply.text) < 1000
    assert post(f"{url}/tasks/mood/predict", {"inputs": "w1"}).status_code == 200


def test_a_declared_length_above_the_limit_is_refused_without_reading_the_body(url: str) -> None:
    reply = talk(url, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_is_limited_too(url: str) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    reply = talk(url, head, *[b"4000\r\n" + b"w" * 0x4000 + b"\r\n"] * 10)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b'"error_type":"too_large"' in reply


def test_a_slow_body_is_refused_and_its_connection_closed(url: str) -> None:
    never = threading.Event()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
    reply = talk(url, head, *[b"w"] * 30, pause=never)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in reply.lower()
    assert b'"error_type":"timeout"' in reply


@pytest.fixture(scope="module")
def guarded(tasks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with two tokens in a file and one in the environment."""
    secrets = tmp_path_factory.mktemp("secrets") / "tokens"
    secrets.write_text("old-token\n\n new-token \n")
    os.environ["REVMUX_TEST_TOKEN"] = "third-tökén"
    config = AppConfig.model_validate({**tasks["mood"], "token_file": str(secrets), "token_env": "REVMUX_TEST_TOKEN"})
    service = Service(config)
    service.serve(config.served)
    with listening(create_app(service)) as url:
        yield url
    service.close()
    del os.environ["REVMUX_TEST_TOKEN"]


@pytest.mark.parametrize("token", ["old-token", "new-token", "third-tökén"])
def test_any_configured_token_is_accepted(guarded: str, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}".encode()}
    assert post(f"{guarded}/predict", {"inputs": "w1"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer old", "Bearer old-tokenx", "Basic old-token", "old-token"]
)
def test_clients_without_a_valid_token_are_refused(guarded: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in (("POST", "/predict"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/v2/models/default")):
        reply = httpx.request(method, guarded + path, headers=headers, timeout=60)
        assert (reply.status_code, reply.json()["error_type"]) == (401, "unauthorized")
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/v2/health/live", "/v2/health/ready", "/", "/static/page.js", "/docs"])
def test_health_and_pages_need_no_token(guarded: str, path: str) -> None:
    assert httpx.get(guarded + path, timeout=60).status_code == 200
    assert httpx.post(f"{guarded}/", json={"inputs": "w1"}, timeout=60).status_code == 401


def test_with_a_route_prefix_only_health_needs_no_token(tasks: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("secret\n")
    config = AppConfig.model_validate({**tasks["mood"], "token_file": str(tmp_path / "tokens")})
    service = Service(config)
    service.serve(config.served)
    outer = FastAPI()
    outer.mount("/api", create_app(service))
    try:
        with listening(outer) as url:
            assert httpx.get(f"{url}/api/health", timeout=60).status_code == 200
            assert httpx.get(f"{url}/api/", timeout=60).status_code == 200
            for path in ("/api/info", "/api/api/health", "/api/healthy"):
                assert httpx.get(url + path, timeout=60).status_code == 401
            assert post(f"{url}/api/predict", {"inputs": "w1"}).status_code == 401
            reply = post(f"{url}/api/predict", {"inputs": "w1"}, headers={"Authorization": "Bearer secret"})
            assert reply.status_code == 200
    finally:
        service.close()


def test_a_missing_or_empty_token_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for file, variable in ((str(tmp_path / "none"), None), (str(tmp_path / "empty"), None), (None, "REVMUX_NO_SUCH")):
        with pytest.raises(UserError, match="token"):
            read_tokens(file, variable)
    assert read_tokens(None, None) == ()


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


def _live(tasks: dict[str, TaskConfig]) -> dict[str, Any]:
    """The configuration as Serve passes it to a replica."""
    return LiveConfig(tasks=tasks).model_dump()


def test_adapters_and_tasks_can_be_changed_while_requests_are_answered(tasks: dict[str, Any], tmp_path: Path) -> None:
    mood, topic = (TaskConfig.model_validate(tasks[name]) for name in ("mood", "topic"))
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


@pytest.fixture(scope="module")
def api(tasks: dict[str, Any]) -> Iterator[Any]:
    """The OpenAPI description of a server with one task, so that requests need not name it."""
    config = AppConfig.model_validate({**tasks["mood"], "plain_load": 1})
    service = Service(config)
    service.serve(config.served)
    with listening(create_app(service)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    service.close()


_CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
_OPERATIONS = [
    ("/predict", "POST"),
    ("/tasks/{task}/predict", "POST"),
    ("/classify", "POST"),
    ("/v1/models", "GET"),
    ("/v2/models/{task}/infer", "POST"),
    ("/v2/models/{task}", "GET"),
    ("/v2/models/{task}/ready", "GET"),
    ("/v2", "GET"),
    ("/v2/health/live", "GET"),
    ("/v2/health/ready", "GET"),
    ("/health", "GET"),
    ("/info", "GET"),
    ("/metrics", "GET"),
]


def test_every_operation_is_fuzzed(api: Any) -> None:
    assert {(found.ok().path, found.ok().method.upper()) for found in api.get_all_operations()} == set(_OPERATIONS)


def _fuzz(api: Any, path: str, method: str, mode: GenerationMode, examples: int, repeatable: bool) -> set[int]:
    """The status codes of all replies."""
    statuses = set()

    @settings(max_examples=examples, derandomize=repeatable, deadline=None, suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if "task" in (case.path_parameters or {}) and len(case.path_parameters["task"]) > 1:
            case.path_parameters["task"] = "default"  # otherwise hardly any request would name a known task
        reply = case.call(timeout=60)
        assert reply.status_code not in (500, 503), reply.text
        statuses.add(reply.status_code)
        case.validate_response(reply, checks=_CHECKS)

    ask()
    return statuses


@pytest.mark.parametrize(("path", "method"), _OPERATIONS)
def test_valid_requests_get_the_replies_of_the_openapi_description(api: Any, path: str, method: str) -> None:
    statuses = _fuzz(api, path, method, GenerationMode.POSITIVE, 40 if method == "POST" else 4, True)
    assert 200 in statuses


@pytest.mark.parametrize(("path", "method"), [operation for operation in _OPERATIONS if "POST" in operation])
def test_invalid_requests_get_the_errors_of_the_openapi_description(api: Any, path: str, method: str) -> None:
    assert 422 in _fuzz(api, path, method, GenerationMode.NEGATIVE, 40, True)


@pytest.mark.long
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), [operation for operation in _OPERATIONS if "POST" in operation])
def test_the_openapi_description_holds_in_a_long_fuzz_run(
    api: Any, path: str, method: str, mode: GenerationMode
) -> None:
    _fuzz(api, path, method, mode, 300, False)


def test_bodies_are_parsed_as_json_whatever_their_content_type(url: str) -> None:
    body = json.dumps({"inputs": "w1", "task": "mood"})
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        assert httpx.post(f"{url}/predict", content=body, headers={"content-type": kind}).status_code == 200
