"""Load from a separate process: a closed loop, or arrivals at fixed times (an open loop).

``python -m benchmarks.serving.load`` reads a :class:`Load` from stdin and writes the replies to stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

HEAD_START = 0.05  # seconds from sending the lead until the closed loop begins; the model has begun it by then


@dataclass(frozen=True)
class Load:
    """The requests, and when each one is sent.

    Attributes:
        url: URL of every request.
        bodies: bodies of the requests, in order.
        connections: connections of the closed loop; each sends its next request as soon as the last one is answered.
        arrivals: for an open loop, the second at which each request is sent, whether or not earlier ones are answered.
        lead: URL and body of a request sent before the closed loop. The model is busy with it while the connections
            queue up, and the measurement begins when it has been answered.
    """

    url: str
    bodies: list[dict[str, Any]]
    connections: int = 1
    arrivals: list[float] | None = None
    lead: tuple[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Reply:
    """The reply to one request.

    Attributes:
        seconds: seconds from the time at which the request was sent, or was due, to the end of the reply.
        ended: end of the reply, in seconds after the start of the leg.
        headers: headers of the reply that begin with ``x-``.
    """

    seconds: float
    ended: float
    headers: dict[str, str]


@dataclass(frozen=True)
class Leg:
    """All replies to a load, each with status 200."""

    replies: list[Reply]

    @property
    def per_second(self) -> float:
        """Requests answered per second."""
        return len(self.replies) / max(reply.ended for reply in self.replies)

    @property
    def p50(self) -> float:
        """Median seconds per request."""
        return statistics.median(reply.seconds for reply in self.replies)

    @property
    def p99(self) -> float:
        """Seconds that 99 % of the requests do not exceed (nearest rank; below 100 requests, the slowest one)."""
        ordered = sorted(reply.seconds for reply in self.replies)
        return ordered[-(-99 * len(ordered) // 100) - 1]

    def mean_header(self, name: str) -> float:
        """Return the mean of a numeric header over all replies."""
        return statistics.fmean(float(reply.headers[name]) for reply in self.replies)


def send(load: Load) -> Leg:
    """Run a load in a separate process on the same machine.

    Raises:
        RuntimeError: a request was not answered with status 200.
    """
    command = [sys.executable, "-m", "benchmarks.serving.load"]
    # The module is found from any working directory.
    paths = filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(
        command, input=json.dumps(asdict(load)), capture_output=True, text=True, check=False, env=environment
    )
    if ended.returncode:
        raise RuntimeError(f"the load on {load.url} failed: {ended.stderr.strip()[-2000:]}")
    return Leg([Reply(**reply) for reply in json.loads(ended.stdout)])


async def _ask(
    client: httpx.AsyncClient,
    url: str,
    body: dict[str, Any],
    sent: float | None = None,
    on_its_way: asyncio.Event | None = None,
) -> dict[str, Any]:
    sent = time.perf_counter() if sent is None else sent

    async def trace(event: str, _: dict[str, Any]) -> None:
        if on_its_way is not None and event.endswith(".send_request_body.complete"):
            on_its_way.set()

    reply = await client.post(url, json=body, extensions={"trace": trace} if on_its_way else {})
    ended = time.perf_counter()
    if reply.status_code != 200:
        raise RuntimeError(f"{url} answered {reply.status_code}: {reply.text[:500]}")
    headers = {name: value for name, value in reply.headers.items() if name.startswith("x-")}
    return {"seconds": ended - sent, "ended": ended, "headers": headers}


async def _closed(client: httpx.AsyncClient, load: Load) -> list[dict[str, Any]]:
    bodies = iter(load.bodies)
    lead = None
    if load.lead:
        on_its_way = asyncio.Event()
        lead = asyncio.create_task(_ask(client, *load.lead, on_its_way=on_its_way))
        sent = asyncio.create_task(on_its_way.wait())
        await asyncio.wait([lead, sent], return_when=asyncio.FIRST_COMPLETED)
        sent.cancel()
        await asyncio.sleep(HEAD_START)

    async def connection(mine: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        return [await _ask(client, load.url, body) for body in mine]

    started = time.perf_counter()
    found = await asyncio.gather(*(connection(bodies) for _ in range(load.connections)))
    if lead:
        started = max(started, (await lead)["ended"])
    replies = [reply for each in found for reply in each]
    return [{**reply, "ended": reply["ended"] - started} for reply in replies]


async def _open(client: httpx.AsyncClient, load: Load, arrivals: list[float]) -> list[dict[str, Any]]:
    started = time.perf_counter()

    async def later(body: dict[str, Any], due: float) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        return await _ask(client, load.url, body, started + due)

    replies = await asyncio.gather(*(later(body, due) for body, due in zip(load.bodies, arrivals, strict=True)))
    return [{**reply, "ended": reply["ended"] - started} for reply in replies]


async def _run(load: Load) -> list[dict[str, Any]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        if load.arrivals is None:
            return await _closed(client, load)
        return await _open(client, load, load.arrivals)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_run(Load(**json.load(sys.stdin))))))
