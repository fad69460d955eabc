"""Faults under load on a real Ray Serve with two replicas: no answer is lost, repeated or swapped.

The adapters answer like the plain model and every text has different scores, so a reply identifies its text.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
import yaml
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from serving_http import HOSTILE, connected, free_port, ray_with_proxy, read_reply, talk
from serving_models import WORDS, load, plain_scores, text, write_adapter, write_model
from torch import Tensor

import revmux
from revmux.errors import UserError
from serve_app.config import server_config
from serve_app.ray_environment import ProxyKind
from serve_app.run import APPLICATION
from serve_app.run import deploy as deploy_alone

pytestmark = pytest.mark.cluster("serve")
ROOT = Path(revmux.__file__).parents[1]
MAX_QUEUE = 160
TOLERANCE = 1e-3


class Cluster(NamedTuple):
    url: str
    proxy: ProxyKind
    deploy: Callable[..., None]
    expected: dict[str, Tensor]
    label_names: list[str]
    model: str


@pytest.fixture(scope="module", params=["haproxy", pytest.param("python", marks=pytest.mark.long)])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster deployed as by ``serve deploy``, from the shipped file."""
    with ray_with_proxy(request.param):
        yield from _deployed(request.param, tmp_path_factory)


def _deployed(proxy: ProxyKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = write_model(tmp_path_factory.mktemp("model"))
    home = tmp_path_factory.mktemp("adapters")
    adapters = {width: str(write_adapter(home, load(model), width)) for width in (2, 4)}
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    page = yaml.safe_load((ROOT / "serve_app" / "serve.yaml").read_text())
    page["http_options"]["port"] = free_port()
    application = page["applications"][0]
    application["args"] |= {"model": str(model), "adapters": [adapters[2]], "max_queue": MAX_QUEUE, "plain_load": 1.0}
    application["args"] |= {"num_replicas": 2, "num_cpus": 0.5, "threads": 1, "body_seconds": 2.0}

    def deploy(live: tuple[int, ...] | None = None, **args: Any) -> None:
        """Change the arguments or the live adapters, and wait until the update is complete."""
        application["args"] |= args
        if live is not None:
            tasks = {"default": {"model": str(model), "adapters": [adapters[width] for width in live]}}
            application["deployments"] = [{"name": "classifier", "user_config": {"tasks": tasks}}]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(page))
        wait_until(lambda: serve.status().applications[APPLICATION].status == "RUNNING")

    ray.init(address="local", include_dashboard=False, logging_level="warning", num_cpus=4)
    try:
        serve.start(proxy_location="HeadOnly", http_options=page["http_options"])
        deploy()
        url = f"http://127.0.0.1:{page['http_options']['port']}"
        wait_until(lambda: _answers(url))
        pretrained = load(model)
        texts = _distinct([text(index) for index in range(150)], pretrained)
        expected = dict(zip(texts, plain_scores(pretrained, texts)))
        yield Cluster(url, proxy, deploy, expected, pretrained.backbone.label_names, str(model))
    finally:
        serve.shutdown()
        ray.shutdown()


def _distinct(texts: list[str], pretrained: Any) -> list[str]:
    """Return texts with distinguishable answers."""
    kept: list[str] = []
    scores = plain_scores(pretrained, texts)
    rows: list[Tensor] = []
    for own, row in zip(texts, scores):
        if all(float((row - other).abs().max()) > 20 * TOLERANCE for other in rows):
            kept.append(own)
            rows.append(row)
    assert len(kept) > 50
    return kept


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


def _replicas(url: str) -> set[str]:
    """Return the replicas that report metrics."""
    try:
        shown = httpx.get(f"{url}/metrics", timeout=30)
        shown.raise_for_status()
    except httpx.HTTPError:
        return set()
    families = text_string_to_metric_families(shown.text)
    return {sample.labels["replica"] for family in families for sample in family.samples}


class Load:
    """Clients that send requests without a pause and repeat those that were temporarily refused.

    Attributes:
        statuses: status codes of all replies; ``"broken"`` counts connections that ended without a reply.
        swapped: replies for another text.
        unclean: refusals that are not JSON or do not say when to retry.
        answered: number of answered texts.
    """

    def __init__(self, cluster: Cluster, clients: int = 6, texts_per_request: int = 4) -> None:
        self.cluster = cluster
        self.texts_per_request = texts_per_request
        self.statuses: Counter[Any] = Counter()
        self.swapped: list[str] = []
        self.unclean: list[str] = []
        self.answered = 0
        self._numbers = count()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let every request that has started finish."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, texts: int) -> None:
        """Wait until this many more texts are answered."""
        goal = self.answered + texts
        wait_until(lambda: self.answered >= goal)

    def check(self) -> None:
        assert not self.swapped
        assert not self.unclean
        assert set(self.statuses) <= {200, 429, 503, "broken"}

    def _ask_on(self) -> None:
        every = list(self.cluster.expected)
        with httpx.Client(base_url=self.cluster.url, timeout=60) as client:
            while not self._stop.is_set():
                start = next(self._numbers) * self.texts_per_request
                self._ask(client, [every[(start + place) % len(every)] for place in range(self.texts_per_request)])

    def _ask(self, client: httpx.Client, texts: list[str]) -> None:
        body = {"inputs": [[part] for part in texts], "raw_scores": True}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                reply = client.post("/predict", json=body)
            except httpx.HTTPError:
                self._note("broken")
            else:
                self._note(reply.status_code)
                if reply.status_code == 200:
                    self.check_answers(texts, reply.json())
                    return
                self._check_refusal(reply)
            self._stop.wait(0.05)
        self.unclean.append(f"no answer to {texts} in two minutes")

    def _note(self, status: Any) -> None:
        with self._lock:
            self.statuses[status] += 1

    def check_answers(self, texts: list[str], answers: list[list[dict[str, Any]]]) -> None:
        if len(answers) != len(texts):
            self.swapped.append(f"{len(answers)} answers to {len(texts)} texts")
        for own, answer in zip(texts, answers):
            found = {item["label"]: item["score"] for item in answer}
            scores = torch.tensor([found[label] for label in self.cluster.label_names])
            if not torch.allclose(scores, self.cluster.expected[own], atol=TOLERANCE, rtol=0):
                self.swapped.append(own)
        with self._lock:
            self.answered += len(texts)

    def _check_refusal(self, reply: httpx.Response) -> None:
        try:
            clean = set(reply.json()) == {"error", "error_type"} and "retry-after" in reply.headers
        except ValueError:
            clean = False
        if not clean:
            self.unclean.append(f"{reply.status_code}: {reply.text[:200]}")


def _kill(prefix: str) -> None:
    """Kill one of Serve's actors, as a crash would."""
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    name = next(name for name in names if name.startswith(prefix))
    ray.kill(ray.get_actor(name, namespace="serve"))


def test_metrics_include_all_replicas_whichever_one_replies(cluster: Cluster) -> None:
    wait_until(lambda: len(_replicas(cluster.url)) == 2)
    assert all(_replicas(cluster.url) == _replicas(cluster.url) for _ in range(4))


def test_a_killed_replica_loses_no_answer(cluster: Cluster) -> None:
    before = _replicas(cluster.url)
    with Load(cluster) as clients:
        clients.wait_for(100)
        _kill(f"SERVE_REPLICA::{APPLICATION}#classifier#")
        clients.wait_for(200)
        wait_until(lambda: len(_replicas(cluster.url)) == 2 and _replicas(cluster.url) != before)
        clients.wait_for(100)
    clients.check()
    assert "broken" not in clients.statuses


def test_requests_lost_with_their_replica_get_a_retryable_error(cluster: Cluster) -> None:
    wait_until(lambda: len(_replicas(cluster.url)) == 2)
    own = next(iter(cluster.expected))
    body = json.dumps({"inputs": own}).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    connections = [connected(cluster.url) for _ in range(16)]
    for connection in connections:
        connection.sendall(head + body[:5])
    assert _answers(cluster.url)  # by now the other requests are at their replicas too, which wait for the rest
    _kill(f"SERVE_REPLICA::{APPLICATION}#classifier#")
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
        _kill("SERVE_PROXY_ACTOR" if cluster.proxy == "python" else "SERVE_HA_PROXY_ACTOR")
        wait_until(lambda: clients.statuses["broken"] > 0)
        clients.wait_for(200)
    clients.check()


def test_an_overload_is_refused_with_503_and_service_recovers(cluster: Cluster) -> None:
    wait_until(lambda: len(_replicas(cluster.url)) == 2)
    with Load(cluster, clients=24, texts_per_request=32) as clients:  # several times the capacity of two queues
        wait_until(lambda: clients.statuses[429] > 5)
        clients.wait_for(500)
    clients.check()
    with Load(cluster, clients=1) as calm:
        calm.wait_for(20)
    calm.check()
    assert set(calm.statuses) == {200}


def test_changing_adapters_restarts_no_replica_and_loses_no_request(cluster: Cluster) -> None:
    before = _replicas(cluster.url)
    with Load(cluster) as clients:
        clients.wait_for(50)
        for live, widths in (((2, 4), [1, 2, 4]), ((4,), [1, 4])):
            cluster.deploy(live=live)
            wait_until(lambda wanted=widths: _widths(cluster.url) == wanted)
            clients.wait_for(100)
    clients.check()
    assert set(clients.statuses) == {200}
    assert _replicas(cluster.url) == before


def _widths(url: str) -> list[int]:
    found: list[int] = httpx.get(f"{url}/info", timeout=30).json()["group_widths"]
    return found


@pytest.mark.long
def test_a_rolling_update_loses_no_request(cluster: Cluster) -> None:
    before = _replicas(cluster.url)
    with Load(cluster) as clients:
        clients.wait_for(50)
        cluster.deploy(max_texts=48)
        wait_until(lambda: len(_replicas(cluster.url)) == 2 and not _replicas(cluster.url) & before)
        clients.wait_for(100)
    clients.check()
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
    assert _answers(cluster.url)


def test_refusals_by_the_proxy_are_json_too(cluster: Cluster) -> None:
    """Serve fails on a request id that is not UTF-8, before it calls any replica."""
    reply = talk(cluster.url, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\n\r\n")
    assert b"content-type: application/json" in reply.lower()
    assert b'"error_type"' in reply


@pytest.mark.long
def test_replicas_scale_up_and_down_with_the_queue_and_lose_no_request(cluster: Cluster) -> None:
    scale = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    cluster.deploy(autoscaling={**scale, "upscale_delay_s": 0, "downscale_delay_s": 0})
    wait_until(lambda: len(_replicas(cluster.url)) == 1)
    with Load(cluster, clients=8) as clients:
        wait_until(lambda: len(_replicas(cluster.url)) == 2)
        clients.wait_for(100)
    clients.check()
    with Load(cluster, clients=1, texts_per_request=1) as few:
        wait_until(lambda: len(_replicas(cluster.url)) == 1)
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
