"""The classification job on a cluster of two machines that loses one of them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from polling import check_end, wait_until
from pyarrow import parquet
from ray_machines import Machines, cluster_of_machines, environment_in, processes_named
from serving_models import load, text, write_adapter, write_model

from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.bulk.output import META

ROWS, UNIT = 4800, 8


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="machines-") as folder:  # not pytest's: Ray's socket paths must stay short
        yield Path(folder)


@pytest.fixture
def machines(folder: Path) -> Iterator[Machines]:
    with cluster_of_machines(folder, environment_in(folder)) as machines:
        yield machines


def parts(output: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(output).glob("part-*.parquet"))}


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_lost_machine_changes_no_byte_of_the_output(machines: Machines, folder: Path) -> None:
    (folder / "model").mkdir()
    model = write_model(folder / "model")
    rows = {"id": range(ROWS), "text": [text(index) for index in range(ROWS)]}
    parquet.write_table(pa.table(rows), folder / "rows.parquet")
    config = BulkConfig(
        input=str(folder / "rows.parquet"),
        output=str(folder / "out"),
        model=str(model),
        adapter=str(write_adapter(folder, load(model), 4)),
        unit_rows=UNIT,
    )
    names = ("input", "output", "model", "adapter", "unit_rows")
    flags = [f"--{name}={getattr(config, name)}" for name in names] + [f"--storage={folder / 'runs'}"]
    flags += [f"--cluster.address={machines.address}", "--cluster.workers=2", "--cluster.cpus_per_worker=1"]
    second = machines.add()
    log, records = folder / "job.log", Path(config.output) / META / "units"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "ray_jobs.classify", *flags]
        process = subprocess.Popen(command, env=machines.environment, stdout=stream, stderr=stream)
        try:
            wait_until(
                lambda: len(list(records.glob("*.json"))) > 10 and processes_named("UnitActor", second.pid),
                seconds=400,
                failure=lambda: log.read_text() if process.poll() is not None else None,
            )
            machines.lose(second)
            done = len(list(records.glob("*.json")))
            check_end(process, log)
        finally:
            process.kill()
    assert 10 < done < ROWS // UNIT, "the machine was lost after the job"
    disturbed = parts(config.output)
    assert parquet.read_table(config.output)["id"].to_pylist() == list(range(ROWS))
    # The parts' names depend on the input only, so a run without Ray on one machine writes the same files.
    for path in Path(config.output).glob("part-*.parquet"):
        path.unlink()
    assert classify_files(config).is_complete
    assert parts(config.output) == disturbed
