"""python -m benchmarks.tasks.routing: what it is worth that each task has a replica of its own.

Four replicas serve 200 tasks on one base. Clients in a closed loop ask all tasks equally often. In one leg, requests name
their task, and HAProxy sends each task to its replica. In the other leg, the same requests name a list with this one task,
which HAProxy sends to the replica with the fewest requests; the replicas do the same work for both. The legs alternate on
the same running server. A wider group costs less per input, so the inputs per group, counted by the replicas, say what the
choice of the replica is worth.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from jsonargparse import ArgumentParser
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.rows import kept_rows, ratio_row
from benchmarks.serving import wrk
from benchmarks.serving.servers import free_port
from benchmarks.serving.settings import WIDTHS, Row, Shape
from benchmarks.serving.workloads import texts_of_length
from benchmarks.tasks.multiplexed import write_tasks
from revmux.errors import UserError
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run
from serve_app.config import server_config
from serve_app.run import deploy, shutdown

RESULT = Path("benchmarks/results/routing.json")
KEPT = Path("runs/routing")
TARGET = 2.0
BODIES = 20_000  # sent in turn, so that a leg repeats few of them
TEXTS = 64
DRAIN_SECONDS = 120.0
WARM_UP_SECONDS = 6
_COUNTERS = ("inputs", "groups", "cost", "requests")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        tasks: number of tasks.
        replicas: number of replicas.
        connections: requests in flight, one load after the other. The target is that of the last one.
        pairs: pairs of legs per load.
        seconds: seconds per leg.
        shape: shape of the base.
        cut: number of layers that each input passes alone.
        tokens: tokens per text.

    Raises:
        UserError: a number is too small.
    """

    tasks: int = 200
    replicas: int = 4
    connections: list[int] = field(default_factory=lambda: [400, 800])
    pairs: int = 3
    seconds: int = 16
    shape: Shape = field(default_factory=lambda: Shape(128, 6, 4, 512))
    cut: int = 2
    tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("tasks", "replicas"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} is {getattr(self, name)}; choose 2 or more")
        for name, value in (("pairs", self.pairs), ("seconds", self.seconds), ("connections", min(self.connections))):
            if value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more")


class Server:
    """The running server.

    Args:
        url: its base URL.
        settings: settings of the benchmark.
        texts: texts of the requests.
        folder: folder for wrk's script.
    """

    def __init__(self, url: str, settings: Settings, texts: Sequence[str], folder: Path) -> None:
        self.url = url
        self.settings = settings
        self.folder = folder
        chosen = random.Random(0)
        self.requests = [(f"task-{chosen.randrange(settings.tasks)}", chosen.choice(texts)) for _ in range(BODIES)]
        self._before = self._counts()

    def leg(self, by_task: bool, connections: int, seconds: int) -> dict[str, float]:
        """Send requests for some seconds, and return what the clients and the replicas counted.

        Args:
            by_task: whether each task has its replica.
            connections: requests in flight.
            seconds: duration.
        """
        bodies = [
            {"task": task, "inputs": text} if by_task else {"tasks": [task], "inputs": text}
            for task, text in self.requests
        ]
        before = self._before
        sent = wrk.load(f"{self.url}/predict", bodies, connections, seconds, self.folder)
        after = self._before = self._counts()
        total = {name: sum(after[name].values()) - sum(before[name].values()) for name in _COUNTERS}
        most: dict[str, float] = {}  # the requests of a task that one replica answered, by task
        for key, number in after["requests"].items():
            most[key[0]] = max(most.get(key[0], 0.0), number - before["requests"].get(key, 0.0))
        return {
            "inputs_per_group": round(total["inputs"] / total["groups"], 3),
            "cost_per_input": round(total["cost"] / total["inputs"], 4),
            "home_share": round(sum(most.values()) / total["requests"], 4),
            "per_second": round(sent.per_second, 2),
            "p50_seconds": round(sent.p50, 3),
            "p99_seconds": round(sent.p99, 3),
        }

    def _counts(self) -> dict[str, dict[tuple[str, str], float]]:
        """The counters by name, and then by task and replica, once no input waits or runs and every replica has reported.

        Raises:
            RuntimeError: that takes too long.
        """
        names = (*_COUNTERS, "queue_inputs")
        deadline = time.monotonic() + DRAIN_SECONDS
        before: dict[tuple[str, str], float] = {}
        while True:
            page = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).raise_for_status().text
            lines = [line for line in page.splitlines() if line.startswith(tuple(f"revmux_{name}" for name in names))]
            found: dict[str, dict[tuple[str, str], float]] = {name: {} for name in names}
            for family in text_string_to_metric_families("\n".join([*lines, ""])):
                for sample in family.samples:
                    counts = found.get(sample.name.removeprefix("revmux_").removesuffix("_total"))
                    if counts is not None:
                        key = sample.labels["task"], sample.labels["replica"]
                        counts[key] = counts.get(key, 0.0) + sample.value
            replicas, waiting = {replica for _, replica in found["requests"]}, sum(found["queue_inputs"].values())
            if len(replicas) == self.settings.replicas and not waiting and found["inputs"] == before:
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(replicas)} replicas reported, with {waiting:g} waiting inputs")
            before = found["inputs"]
            time.sleep(0.5)


def measure(settings: Settings) -> list[Row]:
    """Start the server, and return the rows of all loads."""
    with TemporaryDirectory(prefix="revmux-routing-") as name:
        folder = Path(name)
        tasks = write_tasks(folder, settings.shape, settings.cut, settings.tokens, settings.tasks)
        tokenizer = load_pretrained(BackboneConfig(str(folder / "base"))).tokenizer
        config = server_config(
            tasks=tasks,
            num_replicas=settings.replicas,
            num_cpus=(os.cpu_count() or 1) / settings.replicas,
            threads=1,
            port=free_port(),
            proxy="haproxy",
        )
        try:
            url = deploy(config, timeout_seconds=600)
            server = Server(url, settings, texts_of_length(tokenizer, settings.tokens, TEXTS), folder)
            for by_task in (True, False):  # a warm-up: one-time work is not measured
                server.leg(by_task, settings.connections[-1], min(settings.seconds, WARM_UP_SECONDS))
            return [row for connections in settings.connections for row in _rows(server, connections)]
        finally:
            shutdown()


def _rows(server: Server, connections: int) -> list[Row]:
    settings = server.settings
    legs: dict[str, list[dict[str, float]]] = {"by_task": [], "fewest_requests": []}
    for _ in range(settings.pairs):
        for name, found in legs.items():
            found.append(server.leg(name == "by_task", connections, settings.seconds))
    medians = {
        name: {key: statistics.median(leg[key] for leg in found) for key in found[0]} for name, found in legs.items()
    }
    how = f"{connections} connections: each task on its replica / on the replica with the fewest requests"
    target = TARGET if connections == settings.connections[-1] else None
    return [
        ratio_row(
            f"{figure}, {how}",
            [mine[key] / other[key] for mine, other in zip(legs["by_task"], legs["fewest_requests"])],
            target if key == "inputs_per_group" else None,
        )
        | medians
        | {"connections": connections}
        for key, figure in (("inputs_per_group", "inputs per group"), ("per_second", "requests per second"))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has not been measured yet, then write the result file; return 2 for invalid arguments."""
    parser = ArgumentParser(
        prog="python -m benchmarks.tasks.routing", description="Measure what a replica of its own is worth to a task."
    )
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--result", type=Path, default=RESULT, help="result file to write")
    parser.add_argument("--keep", type=Path, default=KEPT, help="folder in which measured rows are kept")
    parsed = parser.parse_args(argv)
    try:
        chosen = parser.instantiate(parsed).as_dict()
        result, keep = chosen.pop("result"), chosen.pop("keep")
        settings = Settings(**chosen)
        wrk.check_wrk()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = kept_rows(keep, "routing", asdict(settings), lambda: measure(settings))
    data = {"texts": "random words", "tokens": settings.tokens}
    backbone = {"name": settings.shape.name, "weights": "random"}
    meta = describe_run("python -m benchmarks.tasks.routing", data, backbone) | {
        "settings": asdict(settings) | {"widths": WIDTHS}
    }
    write_json(result, {"meta": meta, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
