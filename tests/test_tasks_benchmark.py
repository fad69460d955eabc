"""The benchmark of many tasks at toy size: every figure is measured, and an interrupted run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks.tasks.__main__ as command
from benchmarks.serving.settings import Shape
from benchmarks.serving.workloads import write_shape
from benchmarks.tasks.page import tasks_words


def test_all_figures_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_shape(tmp_path / "base", Shape(32, 3, 2, 64))
    result = tmp_path / "tasks.json"
    sizes = {"tasks": 4, "cold": 2, "rank": 2, "frozen_layers": 2, "together": 2, "rounds": 2, "requests": 8}
    flags = [f"--{name}={value}" for name, value in (sizes | {"clients": 2, "tokens": 8, "threads": 1}).items()]
    arguments = [f"--base={base}", *flags, f"--result={result}", f"--keep={tmp_path / 'keep'}"]
    assert command.main(arguments) == 0
    found = json.loads(result.read_text())
    assert [row["pairs"] for row in found["rows"]] == [1, 2, 2, 2, 2, 2, 2]
    assert all(row["ratio_median"] > 0 for row in found["rows"][1:])  # tiny tasks add too little memory to be seen
    assert [row["target"] for row in found["rows"]] == [1.2, 100, 0.7, 2.5, None, None, None]
    memory = found["rows"][0]
    assert memory["counted_bytes"] < memory["file_bytes"]
    page = tasks_words(found)["tasks"]
    assert all(f"| {row['name']} |" in page for row in found["rows"])
    monkeypatch.setattr(command, "replica", None)  # nothing has to be measured again
    assert command.main(arguments) == 0
    assert json.loads(result.read_text())["rows"] == found["rows"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--together", "1"]) == 2
    assert "together is 1" in capsys.readouterr().err
