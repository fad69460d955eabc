"""Memory of bulk classification: a million rows need as much as ten thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet
from ray_machines import processes_named
from serving_models import load, write_adapter, write_model

from benchmarks.bulk.peak import write_rows

UNIT = 2048
"""Even the small file has more units than a worker holds at once."""
LIMIT = 1_500
"""Megabytes that neither the driver nor the worker may need."""


def resident(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        return float(process.memory_info().rss) / 1e6
    return 0.0


def run(rows: int, folder: Path, model: Path, adapter: Path) -> dict[str, float]:
    """Classify a file with the job; returns the peak megabytes of the driver and of its worker."""
    write_rows(folder / f"{rows}.parquet", rows)
    flags = {
        "input": folder / f"{rows}.parquet",
        "output": folder / f"out-{rows}",
        "model": model,
        "adapter": adapter,
        "unit_rows": UNIT,
        "storage": folder / "runs",
        "cluster.workers": 1,
    }
    command = [sys.executable, "-m", "ray_jobs.classify", *(f"--{name}={value}" for name, value in flags.items())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    peaks = {"driver": 0.0, "worker": 0.0}
    with (folder / f"{rows}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                peaks["driver"] = max(peaks["driver"], resident(psutil.Process(process.pid)))
                for worker in processes_named("UnitActor", process.pid):
                    peaks["worker"] = max(peaks["worker"], resident(worker))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.kill()
    assert process.returncode == 0, (folder / f"{rows}.log").read_text()
    parts = sorted((folder / f"out-{rows}").glob("part-*.parquet"))
    assert sum(parquet.read_metadata(part).num_rows for part in parts) == rows
    assert parquet.read_table(parts[-1])["id"].to_pylist()[-1] == rows - 1
    return peaks


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_thirty_times_the_rows_need_the_same_memory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path, load(model), 4)
    small, large = (run(rows, tmp_path, model, adapter) for rows in (10_000, 300_000))
    assert 100 < large["driver"] < min(LIMIT, 1.2 * small["driver"]), (small, large)
    assert 100 < large["worker"] < min(LIMIT, 1.2 * small["worker"]), (small, large)
