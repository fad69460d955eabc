"""The classification job on a real local Ray cluster: lost workers, a lost driver, poisoned units, MLflow, mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import ray
from mlflow import MlflowClient
from polling import wait_until
from pyarrow import parquet
from serving_models import load, text, write_adapter, write_model

from ray_jobs import classify, cli
from ray_jobs.bulk import pool
from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.cli import Unfinished
from ray_jobs.cluster import ClusterConfig
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.bulk.output import META
from revmux.bulk.units import Unit

ROWS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, and rows in two files."""
    folder = tmp_path_factory.mktemp("classify")
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_adapter(folder, load(folder / "model"), 4)
    (folder / "rows").mkdir()
    frame = pd.DataFrame({"id": range(ROWS), "text": [text(index) for index in range(ROWS)]})
    frame[:200].to_parquet(folder / "rows" / "a.parquet", index=False, row_group_size=50)
    frame[200:].to_parquet(folder / "rows" / "b.parquet", index=False, row_group_size=50)
    return folder


@pytest.fixture
def job(folder: Path, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> ClassifyJob:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    return ClassifyJob(
        input=str(folder / "rows"),
        output=str(tmp_path / "out"),
        model=str(folder / "model"),
        adapter=str(folder / "token-split-4"),
        unit_rows=25,
        max_batch_tokens=512,
        audit=0.5,
        storage=str(tmp_path / "runs"),
        cluster=ClusterConfig(workers=1, cpus_per_worker=0.5, max_failures=1),
    )


def parts(output: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(output).glob("part-*.parquet"))}


def ids(output: str) -> list[int]:
    found: list[int] = parquet.read_table(output)["id"].to_pylist()
    return found


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of a run without Ray."""
    output = str(tmp_path_factory.mktemp("undisturbed") / "out")
    config = BulkConfig(
        input=str(folder / "rows"),
        output=output,
        model=str(folder / "model"),
        adapter=str(folder / "token-split-4"),
        unit_rows=25,
        max_batch_tokens=512,
        audit=0.5,
    )
    assert classify_files(config).is_complete
    return parts(output)


@pytest.mark.cluster("shared")
def test_a_job_with_a_killed_worker_writes_what_the_library_writes_and_records_it(
    job: ClassifyJob, ray_here: None, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Killed(pool.UnitActor):
        def run(self, unit: Unit) -> Any:
            marker = tmp_path / "killed"
            if unit.number == 5 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(unit)

    monkeypatch.setattr(pool, "UnitActor", Killed)
    classify.main(replace(job, price=2.5))
    assert (tmp_path / "killed").exists()
    assert parts(job.output) == undisturbed
    assert ids(job.output) == list(range(ROWS))
    client = MlflowClient(f"sqlite:///{job.storage}/mlflow.db")
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["rows"] == ROWS
    assert run.data.metrics["share_done"] == 1
    assert 0 < run.data.metrics["device_busy"] <= 1
    assert run.data.metrics["cost"] < 1
    assert run.data.metrics["agreement"] == 1
    assert run.data.metrics["price"] == pytest.approx(2.5 * run.data.metrics["worker_hours"])
    assert run.data.metrics["price_per_million"] == pytest.approx(run.data.metrics["price"] * 1e6 / ROWS)
    assert run.data.metrics["price"] > 0
    assert run.data.metrics["plain_price"] > 0
    names = {item.path for item in client.list_artifacts(run.info.run_id, "summary")}
    assert names == {"summary/summary.html", "summary/summary.png"}
    classify.main(job)  # nothing is left to do, and the run is the same one
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.cluster("shared")
@pytest.mark.long
def test_a_unit_that_kills_its_worker_is_left_out_and_its_neighbours_are_not(
    job: ClassifyJob, ray_here: None, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Poisoned(pool.UnitActor):
        def run(self, unit: Unit) -> Any:
            if unit.number == 3:
                with (tmp_path / "tries").open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(unit)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "UnitActor", Poisoned)
        with pytest.raises(Unfinished, match=r"1 of 12 units \(25 rows\) failed 2 times each") as unfinished:
            classify.main(replace(job, attempts=2))
    assert unfinished.value.status == 3
    assert len((tmp_path / "tries").read_text()) in (2, 3)  # the first time perhaps in company
    assert parts(job.output).items() == {item for item in undisturbed.items() if "part-000003" not in item[0]}
    assert not (Path(job.output) / META / "manifest.json").exists()
    page = (Path(job.output) / META / "summary.html").read_text()
    assert "rows 75 to 99 of" in page
    classify.main(job)  # the same command tries it again
    assert parts(job.output) == undisturbed


@pytest.mark.cluster("shared")
def test_a_damaged_file_fails_its_units_only(job: ClassifyJob, ray_here: None, folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    good, bad = (folder / "rows" / "a.parquet").read_bytes(), bytearray((folder / "rows" / "b.parquet").read_bytes())
    bad[4:400] = b"\xff" * 396  # the footer, by which units are listed, stays intact
    (rows / "a.parquet").write_bytes(good)
    (rows / "b.parquet").write_bytes(bytes(bad))
    argv = ["--input", str(rows), "--output", job.output, "--model", str(job.model), "--unit_rows", "100"]
    argv += ["--storage", job.storage, "--cluster.workers", "1", "--cluster.cpus_per_worker", "0.5", "--attempts", "1"]
    assert classify.command(argv) == 3
    found = ids(job.output)
    assert found[:200] == list(range(200))
    assert len(found) < ROWS


@pytest.mark.cluster("shared")
def test_the_audit_stops_the_job_with_its_own_status(job: ClassifyJob, ray_here: None, folder: Path) -> None:
    random = write_adapter(folder, load(folder / "model"), 4, method="revmux")
    with pytest.raises(Unfinished, match=r"below audit_floor 0\.9") as unfinished:
        classify.main(replace(job, adapter=str(random), audit=1.0, audit_floor=0.9))
    assert unfinished.value.status == 4


def test_the_documented_commands_have_valid_settings() -> None:
    page = (Path(__file__).parents[1] / "docs" / "classify.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:revmux classify|ray job submit .* ray_jobs\.classify) (.*)", page, re.M)
    assert len(found) == 2
    for flags in found:
        job = cli.parse(ClassifyJob, None, shlex.split(flags))
        assert job.input.startswith(("reviews/", "s3://bucket/"))


@pytest.mark.cluster("shared")
def test_the_documented_command_and_function_run_as_written(
    job: ClassifyJob, ray_here: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "classify.md").read_text()
    (command,) = re.findall(r"^revmux classify (.*)", page, re.M)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    for source, target in {"model": "runs/task-model", "token-split-4": "runs/adapters/revmux-n4-l2"}.items():
        shutil.copytree(folder / source, target)
    Path("reviews").mkdir()
    shutil.copy(folder / "rows" / "a.parquet", "reviews")
    assert classify.command(shlex.split(command)) == 0
    assert ids("answers") == list(range(200))
    assert {path.name for path in Path("answers", META).iterdir()} >= {"manifest.json", "summary.html", "summary.png"}
    shutil.copy("reviews/a.parquet", "reviews.parquet")
    names: dict[str, Any] = {}
    exec(code.replace('"answers"', '"others"').replace('"cuda"', '"cpu"'), names)
    assert sum(names["report"].totals.labels.values()) == 200


@pytest.mark.cluster("shared")
def test_a_csv_with_five_classes_of_ones_own_is_classified(
    job: ClassifyJob, ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["furious", "sad", "neutral", "glad", "delighted"]
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", labels)
    frame = pd.DataFrame({"ticket": [f"T-{row}" for row in range(40)], "message": [text(row) for row in range(40)]})
    frame.loc[3, "message"] = 'w1, w2 "w3"\nw4'
    frame.loc[7, "message"] = ""
    frame.to_csv(tmp_path / "tickets.csv", index=False)
    argv = ["--input", str(tmp_path / "tickets.csv"), "--output", job.output, "--model", str(tmp_path / "model")]
    argv += ["--text_column", "message", "--keep_columns", "[ticket]", "--all_scores", "true", "--storage", job.storage]
    argv += ["--cluster.workers", "1", "--cluster.cpus_per_worker", "0.5"]
    assert classify.command(argv) == 0
    table = parquet.read_table(job.output)
    found = table.to_pandas()
    assert found["ticket"].tolist() == frame["ticket"].tolist()
    assert found["label"].isna().tolist() == [row == 7 for row in range(40)]
    assert found["error"][7] == "the text is empty"
    assert set(found["label"].dropna()) <= set(labels)
    assert json.loads(table.schema.metadata[b"revmux.labels"]) == labels
    for label, scores in zip(found["label"].drop(7), found["scores"].drop(7)):
        assert labels[scores.argmax()] == label
        assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert "40 rows, 1 bad" in capsys.readouterr().out


@pytest.mark.cluster("shared")
def test_a_model_that_does_not_fit_is_one_line(
    job: ClassifyJob, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--input", job.input, "--output", job.output, "--model", str(job.model), "--max_length", "500"]
    argv += ["--storage", job.storage, "--cluster.workers", "1", "--cluster.cpus_per_worker", "0.5"]
    assert classify.command(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "max_length is 500" in line


@pytest.mark.cluster("shared")
@pytest.mark.timeout(600)
def test_a_killed_driver_continues_with_the_same_command(
    job: ClassifyJob, ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 2400
    table = pa.table({"id": range(rows), "text": [text(index) for index in range(rows)]})
    parquet.write_table(table, tmp_path / "many.parquet")
    flags = {
        "input": tmp_path / "many.parquet",
        "output": job.output,
        "model": job.model,
        "adapter": job.adapter,
        "unit_rows": 8,
        "storage": job.storage,
        "cluster.workers": 1,
        "cluster.cpus_per_worker": 1,
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.classify", *argv], env=environment, stdout=stream, stderr=stream
        )
        records = Path(job.output) / META / "units"
        wait_until(
            lambda: len(list(records.glob("*.json"))) > 10,
            failure=lambda: log.read_text() if process.poll() is not None else None,
        )
        process.kill()
        process.wait()
    done = len(list(records.glob("*.json")))
    assert 10 < done < 300
    before = parts(job.output)
    assert "300 units, of which 0 are finished" in log.read_text()
    assert classify.command(argv) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "300 units, of which" in line]
    assert "of which 0 are finished" not in line
    assert ids(job.output) == list(range(rows))
    assert before.items() <= parts(job.output).items()
    manifest = json.loads((Path(job.output) / META / "manifest.json").read_text())
    assert (manifest["rows"], len(manifest["parts"])) == (rows, 300)
