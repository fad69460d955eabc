"""The memory of the driver and of a worker does not grow with the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data import alone, cache_in, drive, recipe_of, work, write_model, write_sentences

SIZES = (110_000, 1_100_000)  # splits of both sizes are drawn from a sample


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system does not report peak memory")
def test_ten_times_the_data_take_the_same_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    driver, worker = [], []
    for size in SIZES:
        write_sentences(tmp_path / f"{size}.csv", size)
        recipe = recipe_of(tmp_path, size, budget_gb=0)
        with cache_in(tmp_path / "cache"):
            driven = alone(drive, recipe)
        driver.append(driven["megabytes"])
        worker.append(alone(work, recipe, driven["tokens"], 100)["megabytes"])
    assert driver[1] < 1.1 * driver[0]
    assert worker[1] < 1.1 * worker[0]
