"""Faults under load on a real Ray Serve with two replicas: no answer is lost, repeated or swapped.

The adapters answer like the plain model and every text has different scores, so a reply identifies its text.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from polling import wait_until
from serving_cluster import Cluster, Load, answers, deployed, kill_proxy, kill_replica, replicas, update_under_load
from serving_http import HOSTILE, connected, free_port, read_reply, talk
from serving_models import WORDS

from revmux.errors import UserError
from serve_app.config import server_config
from serve_app.run import APPLICATION
from serve_app.run import deploy as deploy_alone

pytestmark = pytest.mark.cluster("serve")


@pytest.fixture(
    scope="module",
    params=[
        ("haproxy", 1),
        pytest.param(("haproxy", 2), marks=pytest.mark.long),
        pytest.param(("python", 1), marks=pytest.mark.long),
    ],
    ids=["haproxy", "front ends", "python"],
)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two models, each in a process that answers HTTP itself, or with two front ends."""
    proxy, front_ends = request.param
    with deployed(proxy, tmp_path_factory, 2, front_ends) as found:
        yield found


def test_metrics_include_all_replicas_whichever_one_replies(cluster: Cluster) -> None:
    wait_until(cluster.complete)
    assert all(replicas(cluster.url) == replicas(cluster.url) for _ in range(4))


def test_a_killed_replica_loses_no_answer(cluster: Cluster) -> None:
    with Load(cluster) as clients:
        for deployment in {"classifier", cluster.with_model}:
            before = replicas(cluster.url)
            clients.wait_for(100)
            kill_replica(deployment)
            clients.wait_for(200)
            wait_until(lambda known=before: cluster.complete() not in (None, known))
        clients.wait_for(100)
    clients.check()
    assert "broken" not in clients.statuses


def test_requests_lost_with_their_replica_get_a_retryable_error(cluster: Cluster) -> None:
    wait_until(cluster.complete)
    own = next(iter(cluster.expected))
    body = json.dumps({"inputs": own}).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    connections = [connected(cluster.url) for _ in range(16)]
    for connection in connections:
        connection.sendall(head + body[:5])
    assert answers(cluster.url)  # by now the other requests are at their replicas too, which wait for the rest
    kill_replica("classifier")
    statuses: Counter[int | None] = Counter()
    for connection in connections:
        with connection:
            connection.sendall(body[5:])
            start, _, content = read_reply(connection).partition(b"\r\n\r\n")
        if not start and cluster.proxy == "haproxy":
            statuses[None] += 1
            continue
        statuses[int(start.split()[1])] += 1
        if not start.startswith(b"HTTP/1.1 200"):
            assert b"retry-after: 1" in start.lower()
            assert json.loads(content)["error_type"] == "unhealthy"
    if cluster.proxy == "python":
        assert set(statuses) == {200, 503}
    else:  # HAProxy repeats complete requests, so none was lost; when it restarts, it closes connections with half a request
        assert 200 in statuses
        assert set(statuses) <= {200, 503, None}


@pytest.mark.long
def test_a_killed_proxy_is_restarted(cluster: Cluster) -> None:
    with Load(cluster) as clients:
        clients.wait_for(100)
        kill_proxy(cluster)
        wait_until(lambda: clients.statuses["broken"] > 0)
        clients.wait_for(200)
    clients.check()


def test_an_overload_is_refused_with_503_and_service_recovers(cluster: Cluster) -> None:
    wait_until(cluster.complete)
    with Load(cluster, clients=24, texts_per_request=32) as clients:  # several times the capacity of two queues
        wait_until(lambda: clients.statuses[429] > 5)
        clients.wait_for(500)
    clients.check()
    with Load(cluster, clients=1) as calm:
        calm.wait_for(20)
    calm.check()
    assert set(calm.statuses) == {200}


def test_changing_adapters_restarts_no_replica_and_loses_no_request(cluster: Cluster) -> None:
    before = replicas(cluster.url)
    with Load(cluster) as clients:
        clients.wait_for(50)
        for live, widths in (((2, 4), [1, 2, 4]), ((4,), [1, 4])):
            cluster.deploy(live=live)
            wait_until(lambda wanted=widths: _widths(cluster.url) == wanted)
            clients.wait_for(100)
    clients.check()
    assert set(clients.statuses) == {200}
    assert replicas(cluster.url) == before


def _widths(url: str) -> list[int]:
    found: list[int] = httpx.get(f"{url}/info", timeout=30).json()["group_widths"]
    return found


@pytest.mark.long
def test_a_rolling_update_loses_no_request(cluster: Cluster) -> None:
    clients = update_under_load(cluster)
    assert set(clients.statuses) == {200}
    assert httpx.get(f"{cluster.url}/info", timeout=30).json()["max_client_batch_size"] == 48


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_json_errors_through_serve(cluster: Cluster, name: str) -> None:
    body, status = HOSTILE[name]
    reply = httpx.post(f"{cluster.url}/predict", content=body, timeout=60)
    # The proxy passes bodies of any size to the replica, which has the default limit here; this one has too many tokens.
    assert reply.status_code == (422 if status == 413 else status)
    assert reply.headers["content-type"] == "application/json"


def test_huge_and_slow_bodies_are_refused(cluster: Cluster) -> None:
    chunk = b"10000\r\n" + b"w" * 0x10000 + b"\r\n"
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    chunked = talk(cluster.url, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)
    assert chunked.startswith(b"HTTP/1.1 413 ")
    dribbled = talk(cluster.url, head + b"Content-Length: 5000\r\n\r\n", *[b"w"] * 60, pause=threading.Event())
    assert dribbled.startswith(b"HTTP/1.1 408 ")
    assert b'"error_type":"timeout"' in dribbled
    assert answers(cluster.url)


def test_refusals_by_the_proxy_are_json_too(cluster: Cluster) -> None:
    """Serve fails on a request id that is not UTF-8, before it calls any replica."""
    reply = talk(cluster.url, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\n\r\n")
    assert b"content-type: application/json" in reply.lower()
    assert b'"error_type"' in reply


@pytest.mark.long
def test_replicas_scale_up_and_down_with_the_queue_and_lose_no_request(cluster: Cluster) -> None:
    if cluster.front_ends > 1:
        pytest.skip("front ends exclude autoscaling")
    scale = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    cluster.deploy(autoscaling={**scale, "upscale_delay_s": 0, "downscale_delay_s": 0})
    wait_until(lambda: len(replicas(cluster.url)) == 1)
    with Load(cluster, clients=8) as clients:
        wait_until(cluster.complete)
        clients.wait_for(100)
    clients.check()
    with Load(cluster, clients=1, texts_per_request=1) as few:
        wait_until(lambda: len(replicas(cluster.url)) == 1)
    few.check()
    assert set(clients.statuses) == set(few.statuses) == {200}
    cluster.deploy(autoscaling=None)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_ten_thousand_mixed_requests_each_get_their_own_answer(cluster: Cluster) -> None:
    every = list(cluster.expected)
    checker = Load(cluster)

    def ask(number: int) -> None:
        own = every[number % len(every)]
        plain = {"inputs": own, "raw_scores": True}
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [own]}
        path, body, status = {
            6: ("/predict", json.dumps({**plain, "max_multiplex": 1}), 200),
            7: ("/v2/models/default/infer", json.dumps({"inputs": [tensor], "parameters": {"raw_scores": True}}), 200),
            8: ("/predict", json.dumps({"inputs": " ".join(WORDS * 2)}), 422),
            9: ("/predict", b'{"inputs": "\xff', 422),
        }.get(number % 10, ("/predict", json.dumps(plain), 200))
        while (reply := client.post(path, content=body)).status_code == 429:
            pass
        assert reply.status_code == status
        if status == 200:
            checker.check_answers([own], [_ranking(reply.json()) if path.startswith("/v2") else reply.json()])

    with httpx.Client(base_url=cluster.url, timeout=120) as client, ThreadPoolExecutor(16) as clients:
        list(clients.map(ask, range(10_000)))
    checker.check()
    assert checker.answered == 8_000


def _ranking(reply: dict[str, Any]) -> list[dict[str, Any]]:
    tensors = {output["name"]: output["data"] for output in reply["outputs"]}
    return [{"label": label, "score": score} for label, score in zip(tensors["labels"], tensors["scores"])]


@pytest.mark.parametrize(
    "mistake",
    [
        {"adapters": ["nowhere"]},
        pytest.param({"token_env": "REVMUX_NO_SUCH_TOKEN", "num_cpus": 0.1}, marks=pytest.mark.long),
    ],
)
def test_a_failed_deployment_leaves_other_applications_alone(cluster: Cluster, mistake: dict[str, Any]) -> None:
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Other:
        async def __call__(self, request: Any) -> str:
            return "still here"

    serve.run(Other.bind(), name="other", route_prefix="/other")  # type: ignore[attr-defined]
    with pytest.raises((UserError, RuntimeError)):  # if an older version is running, Serve does not pass on the cause
        deploy_alone(server_config(model=cluster.model, port=free_port(), **mistake))
    left = serve.status().applications
    assert left["other"].status == "RUNNING"
    assert httpx.get(f"{cluster.url}/other", timeout=60).text == "still here"
    # The application with this name is replaced only once a deployment starts.
    assert (APPLICATION in left) == ("adapters" in mistake)
