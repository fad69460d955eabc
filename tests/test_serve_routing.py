"""Requests of a task go to one replica while it is not busy, on a real Ray Serve with two replicas."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import httpx
import pytest
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from serving_http import connected, free_port
from tiny_models import write_tiny_model

from revmux.estimate.serving_memory import kept_memory
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from serve_app.config import ServerConfig, server_config
from serve_app.ray_environment import ProxyKind
from serve_app.run import deploy, shutdown

pytestmark = pytest.mark.cluster("serve")
TASKS = [f"task-{number}" for number in range(6)]
ROUNDS = 8


class Server(NamedTuple):
    url: str
    config: ServerConfig


@pytest.fixture(scope="module", params=["haproxy", pytest.param("python", marks=pytest.mark.long)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas, each with room for four of six tasks."""
    proxy: ProxyKind = request.param
    root = tmp_path_factory.mktemp("models")
    models = {name: str(write_tiny_model(root / name, seed)) for seed, name in enumerate(TASKS)}
    pretrained = load_pretrained(BackboneConfig(model=models[TASKS[0]], max_length=16))
    config = server_config(
        tasks={name: {"model": model, "max_length": 16} for name, model in models.items()},
        memory_gb=4.5 * kept_memory(pretrained.backbone, []).total / 1e9,
        num_replicas=2,
        num_cpus=0.5,
        threads=1,
        port=free_port(),
        proxy=proxy,
    )
    try:
        yield Server(deploy(config), config)
    finally:
        shutdown()


def requests_of(url: str) -> dict[str, Counter[str]]:
    """The number of admitted requests of each task by replica."""
    found: dict[str, Counter[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            if sample.name == "revmux_requests_total":
                found.setdefault(sample.labels["task"], Counter())[sample.labels["replica"]] += int(sample.value)
    return found


def ask(url: str, task: str) -> None:
    httpx.post(f"{url}/tasks/{task}/predict", json={"inputs": "w1 w2"}, timeout=60).raise_for_status()


def test_the_requests_of_a_task_go_to_one_replica_and_to_the_other_while_that_is_busy(server: Server) -> None:
    url = server.url
    replicas: dict[str, list[str]] = {}

    def each_task_has_one() -> bool:
        before = requests_of(url)
        for _ in range(ROUNDS):
            for task in TASKS:
                ask(url, task)
        found = {task: own - before.get(task, Counter()) for task, own in requests_of(url).items()}
        assert sum(own.total() for own in found.values()) == ROUNDS * len(TASKS)
        replicas.update({task: list(own) for task, own in found.items()})
        return all(len(names) == 1 for names in replicas.values())

    if server.config.proxy == "haproxy":
        wait_until(each_task_has_one)  # until HAProxy knows the replicas, it asks Serve's own proxy
    else:
        each_task_has_one()
    assert sum(map(len, replicas.values())) < 1.75 * len(
        TASKS
    )  # at random, nearly 2 each; both replicas hold some of the tasks
    if server.config.proxy == "python":
        return  # a replica is busy only when it accepts no more requests
    [home] = replicas[TASKS[0]]
    before = requests_of(url)[TASKS[0]]
    with ExitStack() as held:
        for _ in range(
            server.config.busy_requests or 0
        ):  # their bodies are longer than HAProxy's buffer, and incomplete
            connection = held.enter_context(connected(url))
            head = f"POST /tasks/{TASKS[0]}/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 40000\r\n\r\n"
            connection.sendall(head.encode() + json.dumps({"inputs": "w " * 12_000}).encode())

        def others_help() -> bool:
            ask(url, TASKS[0])
            found = requests_of(url)[TASKS[0]]
            return any(found[name] > before[name] for name in found if name != home)

        wait_until(others_help)
    settled = requests_of(url)[TASKS[0]][home]

    def is_home_again() -> bool:
        ask(url, TASKS[0])
        return requests_of(url)[TASKS[0]][home] > settled

    wait_until(is_home_again)
