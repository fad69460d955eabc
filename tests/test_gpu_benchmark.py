"""The benchmark on a GPU: the same code at toy size on the CPU, and null rows without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from benchmarks.gpu.__main__ import unmeasured_rows
from benchmarks.gpu.page import gpu_words
from benchmarks.gpu.sizes import SIZES, Sizes
from benchmarks.gpu.throughput import measure_shape
from benchmarks.gpu.training import measure_training

pytestmark = pytest.mark.numeric
META = {"machine": {"gpu": None}, "versions": {"torch": "2"}, "commit": None}


def toy(model: Path, model_type: str) -> Sizes:
    tiny_config(model_type, num_hidden_layers=4).save_pretrained(model)
    return Sizes({str(model): 8}, length=16, side=64, pairs=1, batch=4, steps=2, dtype=torch.float32)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_every_system_has_a_rate_and_a_share_of_the_peak(model_type: str, tmp_path: Path) -> None:
    sizes = toy(tmp_path, model_type)
    rows = measure_shape(str(tmp_path), torch.device("cpu"), sizes)
    assert [row["title"] for row in rows] == [
        "model alone (Transformers)",
        "SISO",
        *(f"RevMUX, N = {width}, l = 2" for width in (2, 4, 8)),
        "exit head, layer 2",
        "exit head, layer 3",
    ]
    costs = [row["cost_counted"] for row in rows]
    assert costs[:2] == [1.0, 1.0]
    assert 1 > costs[6] > costs[5] > 0.4
    for row in rows:
        operations = row["peak_share"] * row["peak_rate"] / row["inputs_per_second"]
        assert operations == pytest.approx(
            row["cost_counted"] * rows[1]["peak_share"] * rows[1]["peak_rate"] / rows[1]["inputs_per_second"], rel=0.1
        )
    words = gpu_words({"meta": META, "rows": rows})["gpu"]
    assert len([line for line in words.splitlines() if line.startswith(f"| {tmp_path} |")]) == 7


def test_training_takes_the_steps_and_is_estimated_beside_the_peak(tmp_path: Path) -> None:
    row = measure_training(str(tmp_path), torch.device("cpu"), toy(tmp_path, "llama"))
    assert row["title"] == "2 training steps"
    assert row["loss"] > 0
    assert row["estimated_bytes"] > 0
    assert row["peak_bytes"] is None
    assert "no GPU" in row["why"]


def test_without_a_gpu_every_row_says_why() -> None:
    rows = unmeasured_rows()
    assert len(rows) == 7 * len(SIZES.inputs) + 1
    assert all(row["inputs_per_second"] is None and row["why"] for row in rows)
    assert "Not measured (no GPU" in gpu_words({"meta": META, "rows": rows})["gpu"]
