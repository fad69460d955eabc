"""A server deployed on a Ray cluster of its own as by ``serve deploy``, and clients that ask it without a pause."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import torch
import yaml
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from serving_http import free_port, ray_with_proxy
from serving_models import load, plain_scores, text, write_adapter, write_model
from torch import Tensor

import revmux
from serve_app.ray_environment import ProxyKind
from serve_app.run import APPLICATION

ROOT = Path(revmux.__file__).parents[1]
MAX_QUEUE = 160
TOLERANCE = 1e-3


class Cluster(NamedTuple):
    """A deployed server.

    Attributes:
        url: its base URL.
        proxy: the HTTP proxy.
        deploy: changes arguments or the live adapters, and waits until the update is complete.
        expected: the plain model's scores of texts with distinguishable answers.
        label_names: names of the scores.
        model: folder of the model.
        engines: number of models.
        front_ends: number of front ends per model.
    """

    url: str
    proxy: ProxyKind
    deploy: Callable[..., None]
    expected: dict[str, Tensor]
    label_names: list[str]
    model: str
    engines: int
    front_ends: int

    @property
    def replicas(self) -> int:
        """Number of processes of the server."""
        return self.engines * (1 if self.front_ends == 1 else 1 + self.front_ends)

    @property
    def with_model(self) -> str:
        """The deployment that has the model."""
        return "classifier" if self.front_ends == 1 else "engine"

    def complete(self) -> set[str] | None:
        """The replicas, if none is missing."""
        found = replicas(self.url)
        return found if len(found) == self.replicas else None


@contextmanager
def deployed(
    proxy: ProxyKind, tmp_path_factory: pytest.TempPathFactory, engines: int = 2, front_ends: int = 1
) -> Iterator[Cluster]:
    """Deploy the shipped file with adapters that answer like the plain model. Every text has other scores."""
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
    application["args"] |= {"num_replicas": engines, "num_cpus": 0.5, "threads": 1, "body_seconds": 2.0}
    application["args"] |= {"front_ends": front_ends}
    url = f"http://127.0.0.1:{page['http_options']['port']}"
    pretrained = load(model)
    texts = _distinct([text(index) for index in range(150)], pretrained)
    expected = dict(zip(texts, plain_scores(pretrained, texts)))

    def deploy(live: tuple[int, ...] | None = None, **args: Any) -> None:
        application["args"] |= args
        if live is not None:
            tasks = {"default": {"model": str(model), "adapters": [adapters[width] for width in live]}}
            application["deployments"] = [{"name": cluster.with_model, "user_config": {"tasks": tasks}}]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(page))
        wait_until(lambda: serve.status().applications[APPLICATION].status == "RUNNING")

    cluster = Cluster(url, proxy, deploy, expected, pretrained.backbone.label_names, str(model), engines, front_ends)
    with ray_with_proxy(proxy):
        ray.init(address="local", include_dashboard=False, logging_level="warning", num_cpus=4)
        try:
            serve.start(proxy_location="HeadOnly", http_options=page["http_options"])
            deploy()
            wait_until(lambda: answers(url))
            yield cluster
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


def answers(url: str) -> bool:
    """Whether the server is healthy."""
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


def replicas(url: str) -> set[str]:
    """Return the replicas that report metrics."""
    try:
        shown = httpx.get(f"{url}/metrics", timeout=30)
        shown.raise_for_status()
    except httpx.HTTPError:
        return set()
    families = text_string_to_metric_families(shown.text)
    return {sample.labels["replica"] for family in families for sample in family.samples}


def kill(prefix: str) -> None:
    """Kill one of Serve's actors, as a crash would."""
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    name = next(name for name in names if name.startswith(prefix))
    ray.kill(ray.get_actor(name, namespace="serve"))


def kill_replica(deployment: str) -> None:
    """Kill a replica of a deployment."""
    kill(f"SERVE_REPLICA::{APPLICATION}#{deployment}#")


def kill_proxy(cluster: Cluster) -> None:
    """Kill the process that listens on the port of the cluster."""
    if cluster.proxy == "python":
        kill("SERVE_PROXY_ACTOR")
        return
    port = httpx.URL(cluster.url).port
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "haproxy" and any(at.laddr.port == port for at in process.net_connections("tcp")):
            process.kill()


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
        assert self.swapped == [], self.swapped
        assert self.unclean == [], self.unclean
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


def update_under_load(cluster: Cluster) -> Load:
    """Replace all replicas while clients send requests, and return these clients."""
    before = replicas(cluster.url)
    with Load(cluster) as clients:
        clients.wait_for(50)
        cluster.deploy(max_texts=48)
        wait_until(lambda: (found := cluster.complete()) and not found & before)
        clients.wait_for(100)
    clients.check()
    return clients
