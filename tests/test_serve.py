"""The server over real HTTP on one local Ray cluster."""

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
from dashboard_queries import needed
from numeric import approx
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from serving_http import talk
from serving_models import WORDS, load, plain_scores, text

import revmux
from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained
from serve_app.config import server_config
from serve_app.run import check_port, deploy, shutdown

pytestmark = pytest.mark.cluster("serve")


class Server(NamedTuple):
    url: str
    pretrained: Pretrained
    log: list[str]


@pytest.fixture(scope="module")
def server(serving_model: Path, serving_adapters: list[Path]) -> Any:
    """A server whose queue has room for one large request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = server_config(
        model=str(serving_model),
        adapters=[str(path) for path in serving_adapters],
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
            yield Server(deploy(config), load(serving_model), log)
        finally:
            logger.removeHandler(handler)
            shutdown()


def post(server: Server, body: Any, path: str = "/predict") -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def labels(pretrained: Pretrained, texts: list[str]) -> list[str]:
    return [pretrained.backbone.label_names[index] for index in plain_scores(pretrained, texts).argmax(-1).tolist()]


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


def test_raw_scores_are_the_models_own(server: Server) -> None:
    found = {item["label"]: item["score"] for item in post(server, {"inputs": "w4 w5", "raw_scores": True}).json()}
    expected = plain_scores(server.pretrained, ["w4 w5"])[0].tolist()
    assert [found[label] for label in server.pretrained.backbone.label_names] == pytest.approx(expected, abs=1e-5)


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


def test_a_request_can_limit_its_own_width(server: Server) -> None:
    batch = [[text(index)] for index in range(16)]
    assert post(server, {"inputs": batch, "max_multiplex": 2}).headers["x-revmux-width"] == ",".join(["2"] * 16)
    assert post(server, {"inputs": batch, "max_multiplex": 1}).headers["x-revmux-width"] == ",".join(["1"] * 16)


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
        (b'{"inputs": "w1", "max_multiplex": 99999999999999999999999}', 422, "validation"),
        (b'{"inputs": "w1", "truncated": true}', 422, "validation"),
        (json.dumps({"inputs": "w1", "tasks": [1] * 50_000}).encode(), 422, "validation"),
        (json.dumps({"inputs": "w1"} | dict.fromkeys(map(str, range(50_000)), 1)).encode(), 422, "validation"),
        (json.dumps({"inputs": " ".join(WORDS * 2)}).encode(), 422, "validation"),
    ],
)
def test_the_status_of_a_refusal_says_whether_client_or_server_is_at_fault(
    server: Server, body: bytes, status: int, kind: str
) -> None:
    reply = httpx.post(server.url + "/predict", content=body, timeout=60)
    assert reply.status_code == status
    assert reply.json()["error_type"] == kind
    assert 0 < len(reply.json()["error"]) < 1000
    assert "retry-after" not in reply.headers
    assert post(server, {"inputs": "w1"}).status_code == 200


def test_a_long_text_is_truncated_on_request_and_the_reply_reports_it(server: Server) -> None:
    reply = post(server, {"inputs": [[" ".join(WORDS * 2)], ["w1"]], "truncate": True})
    assert reply.status_code == 200
    assert reply.headers["x-revmux-truncated"] == "true,false"


def test_unknown_paths_and_methods_get_json_errors(server: Server) -> None:
    assert httpx.get(server.url + "/predict", timeout=60).json()["error_type"] == "method_not_allowed"
    assert httpx.get(server.url + "/nothing", timeout=60).json()["error_type"] == "not_found"


def test_the_health_check_probes_the_model(server: Server) -> None:
    asked = httpx.get(server.url + "/info", timeout=60).json()["replica"]["inputs"]["1"]
    assert httpx.get(server.url + "/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(server.url + "/info", timeout=60).json()["replica"]["inputs"]["1"] > asked


def test_info_names_the_model_its_adapters_and_every_limit(server: Server) -> None:
    info = httpx.get(server.url + "/info", timeout=60).json()
    assert info["model_sha256"] == server.pretrained.identity["sha256"]
    assert info["model_type"]["classifier"]["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert [(item["num_inputs"], item["prefill_layers"]) for item in info["adapters"]] == [(2, 1), (4, 1)]
    assert info["group_widths"] == [1, 2, 4]
    limits = {"max_multiplex": 4, "max_queue": 200, "max_client_batch_size": 200, "max_input_length": 64}
    assert {name: info[name] for name in limits} == limits
    assert info["version"] == revmux.__version__


def test_the_log_states_at_the_start_what_a_replica_keeps_in_memory(server: Server) -> None:
    kept = httpx.get(server.url + "/info", timeout=60).json()["memory"]
    backbone = server.pretrained.backbone
    assert kept["backbone"] == sum(tensor.nbytes for tensor in (*backbone.parameters(), *backbone.buffers()))
    assert [adapter["merged"] for adapter in kept["adapters"]] == [0, 0]
    (line,) = (line for line in server.log if "in memory" in line)
    assert line.startswith(f"task 'default' keeps {kept['total'] / 2**20:,.1f} MiB in memory: ")


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
    assert {name for name, _ in exact} == {f"revmux_step_seconds_{part}" for part in ("bucket", "count", "sum")}
    assert {key: found[f"ray_{key[0]}", key[1]] for key in exact} == exact
    assert needed("ray_revmux").keys() <= {name for name, _ in found}


def _series(url: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values of our series by name and the server's own labels, sorted by label name. Serve and Ray add others."""
    own = ("le", "method", "route", "stage", "status", "step", "task", "width")
    return {
        (sample.name, tuple(sample.labels[label] for label in own if label in sample.labels)): sample.value
        for family in text_string_to_metric_families(httpx.get(url, timeout=30).text)
        for sample in family.samples
        if "revmux_" in sample.name
    }


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


def test_the_port_of_a_running_server_is_detected_as_busy(server: Server) -> None:
    with pytest.raises(UserError, match="in use"):
        check_port("127.0.0.1", int(server.url.rpartition(":")[2]))
