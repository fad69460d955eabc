"""The compared servers, all on this machine: ours, a plain Ray Serve deployment, and Infinity."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from benchmarks.serving.load import Leg, Load, send
from benchmarks.serving.settings import CUTS, Settings
from benchmarks.serving.workloads import LENGTH, Workload
from revmux.utils.environment import replica_environment

PLAIN_PREFIX = "/plain"
START_SECONDS = 180.0


class DidNotStart(Exception):
    """Another project's server exited or did not answer in time."""


class Servers:
    """Servers of one backbone; each starts at its first request, and all stop at the end.

    Args:
        workload: the backbone to serve.
        settings: settings of the benchmark: threads per server, and the path of Infinity.
    """

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.workload = workload
        self.settings = settings
        self._stack = ExitStack()

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def _ray_serve(self) -> str:
        """Base URL of our server and of the plain deployment."""
        return self._stack.enter_context(_ray_serve(self.workload, self.settings))

    @cached_property
    def _infinity(self) -> str:
        assert self.settings.infinity is not None
        return self._stack.enter_context(
            infinity_server(
                self.settings.infinity, self.workload.folder, self.workload.sizes.max_batch, self.settings.threads
            )
        )

    def ours(
        self,
        requests: int,
        cut: int,
        max_multiplex: int | None = None,
        arrivals: list[float] | None = None,
        connections: int | None = None,
    ) -> Leg:
        """Run a leg on our server.

        Args:
            requests: number of requests.
            cut: l of the adapters.
            max_multiplex: maximum width that each request names; None leaves the width to the server.
            arrivals: arrivals of an open loop, see :class:`benchmarks.serving.load.Load`.
            connections: connections of a closed loop; None saturates the server, after a leading request.
        """
        base = self._ray_serve
        named = {} if max_multiplex is None else {"max_multiplex": max_multiplex}
        bodies = [{"inputs": text, **named} for text in self._texts(requests)]
        # The leading request is for the other task, so that it does not count in this task's figures.
        other = next(each for each in CUTS if each != cut)
        lead = (_predict(base, other), {"inputs": self.workload.texts[0], "max_multiplex": 1})
        return self._send(_predict(base, cut), bodies, lead, arrivals, connections)

    def plain_model(self, requests: int) -> Leg:
        """Run a leg on our server at N = 1."""
        return self.ours(requests, min(CUTS), 1)

    def plain_batch(self, requests: int, arrivals: list[float] | None = None) -> Leg:
        """Run a leg on the plain ``@serve.batch`` deployment."""
        url = f"{self._ray_serve}{PLAIN_PREFIX}"
        bodies = [{"inputs": text} for text in self._texts(requests)]
        return self._send(url, bodies, (url, bodies[0]), arrivals, None)

    def infinity(self, requests: int) -> Leg:
        """Run a leg on Infinity.

        Raises:
            DidNotStart: Infinity does not run on this machine.
        """
        url = f"{self._infinity}/classify"
        bodies: list[dict[str, Any]] = [
            {"model": self.workload.folder.name, "input": [text]} for text in self._texts(requests)
        ]
        return self._send(url, bodies, (url, bodies[0]), None, None)

    def step_seconds(self, cut: int) -> dict[str, float]:
        """Return the seconds of all forward passes so far, by step, for the adapters of one cut."""
        info = httpx.get(f"{self._ray_serve}/info", timeout=60, trust_env=False).raise_for_status().json()
        return dict(info["replica"]["tasks"][_task(cut)]["seconds"])

    def _texts(self, requests: int) -> list[str]:
        texts = self.workload.texts
        return [texts[index % len(texts)] for index in range(requests)]

    def _send(
        self,
        url: str,
        bodies: list[dict[str, Any]],
        lead: tuple[str, dict[str, Any]],
        arrivals: list[float] | None,
        connections: int | None,
    ) -> Leg:
        if arrivals is not None:
            return send(Load(url, bodies, arrivals=arrivals))
        if connections is not None:
            return send(Load(url, bodies, connections))
        return send(Load(url, bodies, self.workload.sizes.connections, lead=lead))


def _task(cut: int) -> str:
    return f"l{cut}"


def _predict(base: str, cut: int) -> str:
    return f"{base}/tasks/{_task(cut)}/predict"


@contextmanager
def _ray_serve(workload: Workload, settings: Settings) -> Iterator[str]:
    from ray import serve

    from benchmarks.serving import plain_batch
    from serve_app.config import server_config
    from serve_app.run import deploy, shutdown

    model, sizes = str(workload.folder), workload.sizes
    tasks = {_task(cut): {"model": model, "adapters": workload.adapters(cut), "max_length": LENGTH} for cut in CUTS}
    config = server_config(
        tasks=tasks, port=free_port(), threads=settings.threads, max_batch=sizes.max_batch, max_queue=4096
    )
    url = deploy(config)
    try:
        plain = plain_batch.build(model, LENGTH, sizes.max_batch, settings.threads, 4096)
        serve.run(plain, name="plain", route_prefix=PLAIN_PREFIX)
        yield url
    finally:
        shutdown()


@contextmanager
def infinity_server(executable: Path, model: Path, max_batch: int, threads: int) -> Iterator[str]:
    """Run Infinity, and yield its base URL.

    Args:
        executable: ``infinity_emb`` in its own environment.
        model: folder of the task model.
        max_batch: maximum number of inputs per forward pass.
        threads: number of CPU threads.

    Raises:
        DidNotStart: it does not run on this machine.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(executable), "v2", "--model-id", str(model), "--served-model-name", model.name]
    command += ["--engine", "torch", "--device", "cpu", "--batch-size", str(max_batch)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-model-warmup"]
    environment = (
        os.environ
        | replica_environment()
        | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            "INFINITY_HOME": str(model.parent),  # by default it writes a cache into the working directory
            "DO_NOT_TRACK": "1",
        }
    )
    log = model.with_name(f"{model.name}-infinity.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_healthy(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        if process.poll() is not None:
            raise DidNotStart(f"infinity_emb ended with status {process.returncode}: {last[:300]}")
        if time.monotonic() > deadline:
            raise DidNotStart(f"infinity_emb did not answer within {START_SECONDS:g} s: {last[:300]}")
        time.sleep(0.5)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
