"""The server over real HTTP on one local Ray cluster, and its parts that need no cluster."""

from __future__ import annotations

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import ray
import torch
import yaml
from dashboard_queries import needed
from fastapi import FastAPI
from numeric import approx
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from serving_http import free_port, talk
from serving_models import WORDS, load, plain_scores, text, write_adapter, write_identifying_model, write_model

import revmux
from revmux.errors import EmptyText, TextError, UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Answer, Draining, InferenceFailed, Overloaded
from serve_app import errors as failures
from serve_app.__main__ import main
from serve_app.__main__ import parse as parse_flags
from serve_app.config import AppConfig, LiveConfig, server_config
from serve_app.errors import TooLarge, Unhealthy
from serve_app.protocol import PredictRequest, parse
from serve_app.run import base_url, check_port, deploy, shutdown
from serve_app.service import Service
from serve_app.sources import fetch_adapter, fetch_model

ROOT = Path(revmux.__file__).parents[1]


class Server(NamedTuple):
    url: str
    pretrained: Pretrained
    log: list[str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    model = write_model(tmp_path_factory.mktemp("model"))
    home = tmp_path_factory.mktemp("adapters")
    return model, [write_adapter(home, load(model), num_inputs) for num_inputs in (2, 4)]


@pytest.fixture(scope="module")
def server(folders: tuple[Path, list[Path]]) -> Any:
    """A server whose queue has room for one large request."""
    model, adapters = folders
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = server_config(
        model=str(model),
        adapters=[str(path) for path in adapters],
        port=port,
        max_queue=200,
        max_texts=200,
        plain_load=1,
    )
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("serve_app.run")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "3000")
        try:
            yield Server(deploy(config), load(model), log)
        finally:
            logger.removeHandler(handler)
            shutdown()


def post(server: Server, body: Any, path: str = "/predict") -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def labels(pretrained: Pretrained, texts: list[str]) -> list[str]:
    return [pretrained.backbone.label_names[index] for index in plain_scores(pretrained, texts).argmax(-1).tolist()]


@pytest.mark.cluster("serve")
@pytest.mark.parametrize("path", ["/predict", "/"])
def test_one_text_gets_a_flat_sorted_list_of_the_plain_models_scores(server: Server, path: str) -> None:
    reply = post(server, {"inputs": "w1 w2 w3"}, path)
    assert reply.status_code == 200
    expected = plain_scores(server.pretrained, ["w1 w2 w3"])[0].softmax(-1)
    found = {item["label"]: item["score"] for item in reply.json()}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert [found[label] for label in server.pretrained.backbone.label_names] == approx(expected.tolist())
    assert reply.headers["x-revmux-width"] == "1"
    times = [float(reply.headers[f"x-{name}-time"]) for name in ("queue", "inference", "total")]
    assert times[2] >= times[1] > 0


@pytest.mark.cluster("serve")
def test_raw_scores_are_the_models_own(server: Server) -> None:
    found = {item["label"]: item["score"] for item in post(server, {"inputs": "w4 w5", "raw_scores": True}).json()}
    expected = plain_scores(server.pretrained, ["w4 w5"])[0].tolist()
    assert [found[label] for label in server.pretrained.backbone.label_names] == pytest.approx(expected, abs=1e-5)


@pytest.mark.cluster("serve")
def test_two_strings_are_one_pair_and_nested_lists_a_batch(server: Server) -> None:
    pair = post(server, {"inputs": ["w1 w2", "w3"]})
    batch = post(server, {"inputs": [["w1 w2"], ["w1 w2", "w3"]], "max_multiplex": 1})
    single = post(server, {"inputs": "w1 w2"})
    assert len(pair.json()) == 3
    assert len(batch.json()) == 2
    assert batch.headers["x-revmux-width"] == "1,1"
    for together, alone in zip(batch.json(), (single.json(), pair.json())):
        assert [item["label"] for item in together] == [item["label"] for item in alone]
        assert [item["score"] for item in together] == pytest.approx([item["score"] for item in alone], abs=1e-5)
    assert pair.json() != single.json()


@pytest.mark.cluster("serve")
def test_the_inference_client_of_huggingface_hub_understands_the_reply(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # in offline mode the client does not even call localhost
    client = InferenceClient(server.url)
    found = client.text_classification("w1 w2 w3")
    assert found[0].label == labels(server.pretrained, ["w1 w2 w3"])[0]
    assert sum(item.score for item in found) == pytest.approx(1)
    best = InferenceClient(base_url=server.url + "/predict").text_classification(
        "w1 w2 w3", top_k=1, function_to_apply="none"
    )
    assert [item.score for item in best] == pytest.approx(
        [plain_scores(server.pretrained, ["w1 w2 w3"]).max().item()], abs=1e-5
    )


@pytest.mark.cluster("serve")
def test_concurrent_clients_share_groups_and_each_gets_its_own_answer(server: Server) -> None:
    before = httpx.get(server.url + "/info", timeout=60).json()["replica"]
    requests = [[text(index) for index in range(start, start + 8)] for start in range(0, 128, 8)]

    def ask(texts: list[str]) -> httpx.Response:
        return post(server, {"inputs": [[part] for part in texts], "raw_scores": True})

    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(ask, requests))
    widths: list[str] = []
    for texts, reply in zip(requests, replies):
        assert reply.status_code == 200
        widths += reply.headers["x-revmux-width"].split(",")
        scores = plain_scores(server.pretrained, texts)
        for answer, expected in zip(reply.json(), scores):
            found = {item["label"]: item["score"] for item in answer}
            torch.testing.assert_close(
                torch.tensor([found[label] for label in server.pretrained.backbone.label_names]),
                expected,
                atol=1e-3,
                rtol=0,
            )
            assert answer[0]["label"] == server.pretrained.backbone.label_names[int(expected.argmax())]
    assert len(widths) == 128
    assert widths.count("4") > 64
    after = httpx.get(server.url + "/info", timeout=60).json()["replica"]
    executions = sum(after["groups"].values()) - sum(before["groups"].values())
    assert executions < 64


@pytest.mark.cluster("serve")
def test_a_request_can_limit_its_own_width(server: Server) -> None:
    batch = [[text(index)] for index in range(16)]
    assert post(server, {"inputs": batch, "max_multiplex": 2}).headers["x-revmux-width"] == ",".join(["2"] * 16)
    assert post(server, {"inputs": batch, "max_multiplex": 1}).headers["x-revmux-width"] == ",".join(["1"] * 16)


@pytest.mark.cluster("serve")
@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"", 400, "empty"),
        (b'{"inputs": []}', 400, "empty"),
        (b'{"inputs": ""}', 400, "empty"),
        (b'{"inputs": [["w1"], [""]]}', 400, "empty"),
        (b'{"inputs": "' + b"w" * 2_000_000 + b'"}', 413, "too_large"),
        (json.dumps({"inputs": [["w1"]] * 201}).encode(), 413, "too_large"),
        (b"not json", 422, "validation"),
        (b'{"inputs": 7}', 422, "validation"),
        (b'{"inputs": "w1", "max_multiplex": 0}', 422, "validation"),
        (b'{"inputs": "w1", "truncated": true}', 422, "validation"),
        (json.dumps({"inputs": " ".join(WORDS * 2)}).encode(), 422, "validation"),
    ],
)
def test_the_status_of_a_refusal_says_whether_client_or_server_is_at_fault(
    server: Server, body: bytes, status: int, kind: str
) -> None:
    reply = httpx.post(server.url + "/predict", content=body, timeout=60)
    assert reply.status_code == status
    assert reply.json()["error_type"] == kind
    assert reply.json()["error"]
    assert "retry-after" not in reply.headers
    assert post(server, {"inputs": "w1"}).status_code == 200


@pytest.mark.cluster("serve")
def test_a_long_text_is_truncated_on_request_and_the_reply_reports_it(server: Server) -> None:
    reply = post(server, {"inputs": [[" ".join(WORDS * 2)], ["w1"]], "truncate": True})
    assert reply.status_code == 200
    assert reply.headers["x-revmux-truncated"] == "true,false"


@pytest.mark.cluster("serve")
def test_unknown_paths_and_methods_get_json_errors(server: Server) -> None:
    assert httpx.get(server.url + "/predict", timeout=60).json()["error_type"] == "method_not_allowed"
    assert httpx.get(server.url + "/nothing", timeout=60).json()["error_type"] == "not_found"


@pytest.mark.cluster("serve")
def test_the_health_check_probes_the_model(server: Server) -> None:
    asked = httpx.get(server.url + "/info", timeout=60).json()["replica"]["inputs"]["1"]
    assert httpx.get(server.url + "/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(server.url + "/info", timeout=60).json()["replica"]["inputs"]["1"] > asked


@pytest.mark.cluster("serve")
def test_info_names_the_model_its_adapters_and_every_limit(server: Server) -> None:
    info = httpx.get(server.url + "/info", timeout=60).json()
    assert info["model_sha256"] == server.pretrained.identity["sha256"]
    assert info["model_type"]["classifier"]["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert [(item["num_inputs"], item["prefill_layers"]) for item in info["adapters"]] == [(2, 1), (4, 1)]
    assert info["group_widths"] == [1, 2, 4]
    limits = {"max_multiplex": 4, "max_queue": 200, "max_client_batch_size": 200, "max_input_length": 64}
    assert {name: info[name] for name in limits} == limits
    assert info["version"] == revmux.__version__


@pytest.mark.cluster("serve")
def test_the_log_states_at_the_start_what_a_replica_keeps_in_memory(server: Server) -> None:
    kept = httpx.get(server.url + "/info", timeout=60).json()["memory"]
    backbone = server.pretrained.backbone
    assert kept["backbone"] == sum(tensor.nbytes for tensor in (*backbone.parameters(), *backbone.buffers()))
    assert [adapter["merged"] for adapter in kept["adapters"]] == [0, 0]
    (line,) = (line for line in server.log if "in memory" in line)
    assert line.startswith(f"task 'default' keeps {kept['total'] / 2**20:,.1f} MiB in memory: ")


@pytest.mark.cluster("serve")
def test_rays_metrics_agent_has_every_metric_of_the_server(server: Server) -> None:
    batch = [[text(index)] for index in range(16)]
    assert post(server, {"inputs": batch, "max_multiplex": 4}).status_code == 200
    assert post(server, {"inputs": ""}).status_code == 400
    own = _series(f"{server.url}/metrics")
    assert own["revmux_inputs_total", ("default", "4")] >= 16
    port = ray.nodes()[0]["MetricsExportPort"]
    found: dict[tuple[str, tuple[str, ...]], float] = {}

    def missing() -> list[Any]:
        found.update(_series(f"http://127.0.0.1:{port}/metrics"))
        return [key for key, value in own.items() if found.get((f"ray_{key[0]}", key[1]), -1) < value]

    wait_until(lambda: not missing(), 60, every=0.5)
    # Health checks and requests for metrics change other series meanwhile, but they run no upper layers.
    exact = {key: value for key, value in own.items() if "upper" in key[1]}
    assert {name for name, _ in exact} == {f"revmux_stage_seconds_{part}" for part in ("bucket", "count", "sum")}
    assert {key: found[f"ray_{key[0]}", key[1]] for key in exact} == exact
    assert needed("ray_revmux").keys() <= {name for name, _ in found}


def _series(url: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values of our series by name and the server's own labels, sorted by label name. Serve and Ray add others."""
    own = ("le", "method", "route", "stage", "status", "task", "width")
    return {
        (sample.name, tuple(sample.labels[label] for label in own if label in sample.labels)): sample.value
        for family in text_string_to_metric_families(httpx.get(url, timeout=30).text)
        for sample in family.samples
        if "revmux_" in sample.name
    }


@pytest.mark.cluster("serve")
def test_serves_processes_answer_http_on_loopback_only(server: Server) -> None:
    """Serve's proxies and replicas also have Ray's own gRPC ports, which need Ray's token."""
    port = int(server.url.rpartition(":")[2])
    found: dict[str, list[tuple[str, int]]] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended in the meantime
            line = " ".join(process.cmdline())
            kinds = ("haproxy -db", "ServeReplica", "ProxyActor", "HAProxyManager")
            if (kind := next((kind for kind in kinds if kind in line), None)) is not None:
                sockets = [one.laddr for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
                found[kind] = found.get(kind, []) + [(one.ip, one.port) for one in sockets]
    assert found.pop("haproxy -db") == [("127.0.0.1", port)]
    assert len(found) == 3
    assert sum(ip == "127.0.0.1" for ip, _ in found["ServeReplica"]) == 1
    open_to_all = [one for sockets in found.values() for ip, one in sockets if ip not in ("127.0.0.1", "::1")]
    assert open_to_all  # Ray's own
    for one in open_to_all:
        try:
            reply = talk(f"http://127.0.0.1:{one}", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        except OSError:
            continue
        assert not reply.startswith(b"HTTP/1")


@pytest.mark.cluster("serve")
def test_the_port_of_a_running_server_is_detected_as_busy(server: Server) -> None:
    with pytest.raises(UserError, match="in use"):
        check_port("127.0.0.1", int(server.url.rpartition(":")[2]))


def test_a_busy_port_is_refused_before_anything_starts(
    folders: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--model", str(folders[0]), "--port", port]) == 2
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_refused_before_anything_starts(folders: tuple[Path, list[Path]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="not an adapter folder"):
        deploy(server_config(model=str(folders[0]), adapters=[str(folders[0])], port=port))


def test_an_adapter_of_another_model_is_refused_before_anything_starts(
    folders: tuple[Path, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.app.build", lambda args: pytest.fail("the application was built"))
    other = tmp_path / folders[0].name
    other.mkdir()
    write_identifying_model(other, seed=1)
    adapter = str(folders[1][0])
    capsys.readouterr()  # discard the progress bars of saving the models
    assert main(["--model", str(other), "--adapters", adapter, "--port", str(free_port())]) == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    assert f"adapter {adapter!r} was trained on {folders[0].name} (sha256 " in shown
    assert f"but the given backbone is {other} (sha256 " in shown


def test_unknown_or_invalid_configuration_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_multiplx.*known keys: .*max_multiplex, "):
        server_config(model="m", max_multiplx=4)
    with pytest.raises(UserError, match="max_queue"):
        server_config(model="m", max_queue=0)
    with pytest.raises(UserError, match=r"max_texts \(33\) exceeds max_queue \(32\)"):
        server_config(model="m", max_queue=32, max_texts=33)
    assert server_config(model="m", max_queue=16).max_texts == 16  # the default follows a short queue
    with pytest.raises(ValidationError, match="port"):
        AppConfig(model="m", port=80)  # type: ignore[call-arg]


def test_command_line_strings_become_settings(folders: tuple[Path, list[Path]]) -> None:
    model, adapters = folders
    config = AppConfig.model_validate(
        {"model": str(model), "adapters": f"{adapters[0]}, models:/toy@best", "max_queue": "40"}
    )
    assert config.adapters == [str(adapters[0]), "models:/toy@best"]
    assert config.max_queue == 40
    for given in ("a,b", "[a, b]"):
        assert parse_flags(["--model", "m", "--adapters", given]).adapters == ["a", "b"]


def test_the_address_is_localhost_by_default(folders: tuple[Path, list[Path]]) -> None:
    assert server_config(model="m").host == "127.0.0.1"
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"


def test_the_deployment_file_is_valid_and_listens_on_localhost() -> None:
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load((ROOT / "serve_app" / "serve.yaml").read_text())
    assert set(raw) <= set(ServeDeploySchema.model_fields)
    schema = ServeDeploySchema.model_validate(raw)
    assert schema.http_options.host == "127.0.0.1"
    assert schema.applications[0].import_path == "serve_app.app:build"
    AppConfig.model_validate(schema.applications[0].args)


def test_a_full_replica_passes_requests_on() -> None:
    from serve_app.app import build

    deployment = build(AppConfig(model="m", max_queue=300, num_replicas=2))._bound_deployment
    assert deployment.max_ongoing_requests == deployment.max_queued_requests == 300 + 128
    assert deployment.num_replicas == 2
    several = {f"t{number}": {"model": "m"} for number in range(3)}
    config = AppConfig.model_validate({"tasks": several, "max_queue": 300, "max_ongoing_requests": 3 * 428})
    assert build(config)._bound_deployment.max_ongoing_requests == 3 * 428
    with pytest.raises(
        UserError, match=r"max_ongoing_requests \(429\) exceeds .* \(428\), so a full replica would never"
    ):
        server_config(model="m", max_queue=300, max_ongoing_requests=429)


def test_front_ends_share_what_their_engine_may_hold_and_take_no_gpu() -> None:
    from serve_app.app import build

    front_ends = build(AppConfig(model="m", num_replicas=2, front_ends=3, num_gpus=1, num_cpus=2))._bound_deployment
    engines = front_ends.init_args[1]._bound_deployment
    assert (front_ends.name, front_ends.num_replicas, front_ends.max_ongoing_requests) == ("classifier", 6, 214)
    assert (engines.name, engines.num_replicas) == ("engine", 2)
    for deployment, cpus, gpus in ((front_ends, 0.1, 0), (engines, 2, 1)):
        assert (deployment.ray_actor_options["num_cpus"], deployment.ray_actor_options["num_gpus"]) == (cpus, gpus)
    assert set(engines.user_config["tasks"]) == {"default"}
    assert not front_ends.user_config


def test_autoscaling_waits_until_replicas_answer_in_groups() -> None:
    with pytest.raises(UserError, match=r"target_ongoing_requests \(32\) is not above plain_load \(40\)"):
        server_config(model="m", plain_load=40, autoscaling={})
    with pytest.raises(UserError, match=r"target_ongoing_requests \(200\) exceeds max_ongoing_requests \(160\)"):
        server_config(model="m", max_queue=32, autoscaling={"target_ongoing_requests": 200})
    assert server_config(model="m", plain_load=31, autoscaling={}).ongoing_requests == 512 + 128


def test_replicas_have_the_environment_variables_of_a_model_that_shares_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve_app.app import build

    def variables() -> dict[str, str]:
        return build(AppConfig(model="m"))._bound_deployment.ray_actor_options["runtime_env"]["env_vars"]

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert variables()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert variables().keys() >= {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert variables()["OMP_WAIT_POLICY"] == "ACTIVE"


def test_settings_that_may_change_without_a_restart_are_in_user_config() -> None:
    from serve_app.app import build

    config = AppConfig(model="m", adapters=["a"], drain_seconds=7, num_gpus=0.5, autoscaling={"max_replicas": 3})
    deployment = build(config)._bound_deployment
    assert deployment.user_config["tasks"]["default"]["adapters"] == ["a"]
    assert LiveConfig.model_validate(deployment.user_config).tasks == config.served
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 32)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    assert deployment.ray_actor_options["num_gpus"] == 0.5


def test_one_task_or_several_but_not_both() -> None:
    several = {"a": {"model": "m"}, "b": {"model": "n", "adapters": "x,y"}}
    assert AppConfig.model_validate({"tasks": several}).served["b"].adapters == ["x", "y"]
    assert list(AppConfig(model="m").served) == ["default"]
    for wrong in ({}, {"model": "m", "tasks": several}, {"tasks": several, "adapters": ["x"]}, {"tasks": {"a/b": {}}}):
        with pytest.raises(ValidationError, match="task"):
            AppConfig.model_validate(wrong)
    with pytest.raises(UserError, match="min_replicas"):
        server_config(model="m", autoscaling={"min_replicas": 3, "max_replicas": 2})


@pytest.mark.parametrize(
    ("inputs", "texts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b"], [("a", "b")]),
        ([["a"], ["b", "c"]], ["a", ("b", "c")]),
        ([["a", "b"]], [("a", "b")]),
    ],
)
def test_all_documented_input_forms_are_accepted(inputs: Any, texts: list[Any]) -> None:
    asked = parse(json.dumps({"inputs": inputs}).encode(), PredictRequest)
    assert asked.texts == texts
    answers = [Answer(torch.zeros(2), 1, "siso", 0.0, 0.0)] * len(texts)
    reply = asked.reply(answers, ["x", "y"])
    nested = isinstance(inputs, list) and isinstance(inputs[0], list)
    assert isinstance(reply[0], list) == nested


@pytest.mark.parametrize(
    "inputs", [None, 1, True, {"text": "a"}, ["a", "b", "c"], [["a"], "b"], [["a", 1]], [[]], [["a", "b", "c"]]]
)
def test_other_input_forms_are_refused(inputs: Any) -> None:
    with pytest.raises(TextError):
        _ = parse(json.dumps({"inputs": inputs}).encode(), PredictRequest).texts


def test_parameters_control_the_nesting_of_the_reply_and_the_scores() -> None:
    answers = [Answer(torch.tensor([0.0, 2.0]), 1, "siso", 0.0, 0.0)]
    empty = parse(b'{"inputs": "a", "parameters": {}}', PredictRequest)
    assert [len(ranking) for ranking in empty.reply(answers, ["x", "y"])] == [2]
    one = parse(b'{"inputs": "a", "parameters": {"top_k": 1, "function_to_apply": "sigmoid"}}', PredictRequest)
    assert one.reply(answers, ["x", "y"]) == [[{"label": "y", "score": pytest.approx(0.8808, abs=1e-4)}]]
    with pytest.raises(TextError, match="temperature"):
        parse(b'{"inputs": "a", "parameters": {"temperature": 1}}', PredictRequest)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EmptyText("m"), 400, "empty"),
        (TooLarge("m"), 413, "too_large"),
        (TextError("m"), 422, "validation"),
        (UserError("m"), 422, "validation"),
        (InferenceFailed("m"), 424, "backend"),
        (Overloaded("m"), 429, "overloaded"),
        (Draining("m"), 503, "unhealthy"),
        (Unhealthy("m"), 503, "unhealthy"),
        (KeyError("secret"), 500, "internal"),
    ],
)
def test_every_failure_has_its_http_status(error: Exception, status: int, kind: str) -> None:
    from fastapi.testclient import TestClient

    app = FastAPI()
    failures.install(app)

    @app.get("/")
    def fail() -> None:
        raise error

    reply = TestClient(app, raise_server_exceptions=False).get("/")
    assert reply.status_code == status
    assert reply.json()["error_type"] == kind
    assert "secret" not in reply.text


def test_adapters_come_from_mlflow_by_run_and_by_alias(
    folders: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("toy", artifact_location=str(tmp_path / "artifacts")))
    client.log_artifacts(run.info.run_id, str(folders[1][0]), "adapter")
    client.create_registered_model("toy")
    version = client.create_model_version("toy", f"{run.info.artifact_uri}/adapter", run.info.run_id)
    client.set_registered_model_alias("toy", "champion", version.version)
    weights = (folders[1][0] / "adapter_model.safetensors").read_bytes()
    for uri in (f"runs:/{run.info.run_id}/adapter", "models:/toy@champion"):
        assert (fetch_adapter(uri, tmp_path) / "adapter_model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="models:/toy@nobody"):
        fetch_adapter("models:/toy@nobody", tmp_path)


def test_task_models_come_from_mlflow_by_run_and_by_alias(
    folders: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("toy", artifact_location=str(tmp_path / "artifacts"))).info
    client.log_artifacts(run.run_id, str(folders[0]), "model")
    client.log_artifacts(run.run_id, str(folders[1][0]), "adapter")
    client.create_registered_model("moods")
    version = client.create_model_version("moods", f"{run.artifact_uri}/model", run.run_id).version
    client.set_registered_model_alias("moods", "champion", version)
    config = AppConfig.model_validate(
        {
            "tasks": {
                "alias": {"model": "models:/moods@champion", "adapters": [f"runs:/{run.run_id}/adapter"]},
                "run": {"model": f"runs:/{run.run_id}/model"},
            }
        }
    )
    service = Service(config)
    service.serve(config.served)
    for name, task in service.engine.tasks.items():
        assert service.info()["tasks"][name]["model_id"] == config.served[name].model
        answer = service.engine.submit(["w1 w2"], task=task, max_multiplex=1)[0].result(60)
        assert torch.equal(answer.scores, plain_scores(load(folders[0]), ["w1 w2"])[0])
    service.close()
    for wrong, message in (
        ("models:/moods@nobody", "cannot download 'models:/moods@nobody' from MLflow"),
        (f"runs:/{run.run_id}/adapter", "contains 0 task models"),
    ):
        with pytest.raises(UserError, match=message):
            fetch_model(wrong, tmp_path)
