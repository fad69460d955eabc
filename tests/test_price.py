"""The price of a million answers, from a plan's measured throughput."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from revmux.__main__ import main
from revmux.estimate.price import price_per_million


def plan_file(folder: Path, rate: float | None = 100.0, served: tuple[str, ...] = ("ladder",)) -> Path:
    ratios = {"siso": 1.0, "ladder": 2.0}
    plan: dict[str, Any] = {
        "meta": {"machine": {"cpu": "a CPU", "cores": 2, "gpu": None}},
        "siso_inputs_per_second": rate,
        "systems": [{"name": name, "throughput_ratio": ratio} for name, ratio in ratios.items()],
        "served": [{"name": name} for name in served],
    }
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def test_a_million_answers_cost_the_hours_that_they_take() -> None:
    assert price_per_million(1_000_000 / 3600, 2.5) == pytest.approx(2.5)
    assert price_per_million(100.0, 3.6) == pytest.approx(10.0)


def test_the_command_prints_the_plain_model_and_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plan_file(tmp_path / "plan")
    assert main(["cost", "--plan", str(folder), "--price", "3.6"]) == 0
    printed = capsys.readouterr().out
    assert "a CPU, 2 cores, at 3.6 per hour" in printed
    rows = [line.split(maxsplit=2) for line in printed.splitlines()[2:]]
    assert rows == [["100.0", "10.00", "plain model"], ["200.0", "5.00", "ladder"]]
    assert main(["cost", "--plan", str(folder / "plan.json"), "--price", "3.6"]) == 0


def test_a_plan_of_the_plain_model_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--plan", str(plan_file(tmp_path / "plan", served=("siso",))), "--price", "1"]) == 0
    assert "so nothing is saved" in capsys.readouterr().out


def test_what_has_no_price_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed, counted = plan_file(tmp_path / "timed"), plan_file(tmp_path / "counted", rate=None)
    for arguments, message in (
        (["--price", "2.5"], "add --plan FOLDER"),
        (["--plan", str(timed)], "add --price"),
        (["--plan", str(timed), "--price", "0"], "price is 0; choose more than 0"),
        (["--plan", str(tmp_path), "--price", "1"], "has no plan.json"),
        (["--plan", str(counted), "--price", "1"], "--measure.throughput_inputs above 0"),
    ):
        assert main(["cost", *arguments]) == 2
        assert message in capsys.readouterr().err
