"""Bulk classification with input, output, adapter and plan on S3, which moto's server stands in for on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from polling import wait_until
from pyarrow import parquet
from pyarrow.fs import FileSelector, S3FileSystem, copy_files
from serving_models import load, text, write_adapter, write_model, write_stage

from revmux import UserError
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig

ROWS, UNIT = 120, 25


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(s3: S3FileSystem, model: Path, tmp_path: Path) -> BulkConfig:
    """120 rows in two files on S3, in five units, with a model and an adapter on S3."""
    frame = pd.DataFrame({"id": range(ROWS), "text": [text(index) for index in range(ROWS)]})
    (tmp_path / "in").mkdir()
    frame[:75].to_parquet(tmp_path / "in" / "a.parquet", index=False)
    frame[75:].to_parquet(tmp_path / "in" / "b.parquet", index=False)
    adapter = write_adapter(tmp_path, load(model), 4)
    place = f"bucket/{tmp_path.name}"
    for name, folder in {"in": tmp_path / "in", "adapters/n4": adapter, "model": model}.items():
        copy_files(str(folder), f"{place}/{name}", destination_filesystem=s3)
    return BulkConfig(
        input=f"s3://{place}/in/*.parquet",
        output=f"s3://{place}/out",
        model=f"s3://{place}/model",
        adapter=f"s3://{place}/adapters/n4",
        unit_rows=UNIT,
        audit=0.5,
    )


def parts(s3: S3FileSystem, config: BulkConfig) -> dict[str, bytes]:
    found = s3.get_file_info(FileSelector(config.output.removeprefix("s3://")))
    paths = [info.path for info in found if info.extension == "parquet"]
    return {path.rpartition("/")[2]: s3.open_input_file(path).readall() for path in sorted(paths)}


def test_s3_gives_the_same_answers_as_the_disk_and_continues(
    s3: S3FileSystem, config: BulkConfig, model: Path, tmp_path: Path
) -> None:
    adapter = str(tmp_path / "token-split-4")
    here = replace(config, input=str(tmp_path / "in"), output=str(tmp_path / "out"), adapter=adapter, model=str(model))
    assert classify_files(here).is_complete
    assert classify_files(config).is_complete
    output = config.output.removeprefix("s3://")
    table = parquet.read_table(output, filesystem=s3)
    assert table["id"].to_pylist() == list(range(ROWS))
    assert table.to_pydict() == parquet.read_table(here.output).to_pydict()
    manifest = json.loads(s3.open_input_file(f"{output}/_revmux/manifest.json").readall())
    before = parts(s3, config)
    assert [part["name"] for part in manifest["parts"]] == list(before)
    s3.delete_file(f"{output}/{list(before)[2]}")
    report = classify_files(config)
    assert (report.resumed, report.units) == (4, 5)
    assert parts(s3, config) == before
    with pytest.raises(UserError, match=r"was started with system\.threshold"):
        classify_files(replace(config, threshold=0.5))


def test_a_plan_on_s3_is_used_with_its_adapters(
    s3: S3FileSystem, config: BulkConfig, model: Path, tmp_path: Path
) -> None:
    pretrained = load(model)
    write_stage(tmp_path / "plan", pretrained, 1, 1, 1, 0.4, method="exit-head")
    write_stage(tmp_path / "plan", pretrained, 2, 2, 2, 0.6)
    stages = [{"adapter": "stage-1/exit-head-1"}, {"adapter": "stage-2/token-split-2"}]
    (tmp_path / "plan" / "plan.json").write_text(json.dumps({"is_met": True, "served": [{"stages": stages}]}))
    plan = f"bucket/{tmp_path.name}/plan"
    copy_files(str(tmp_path / "plan"), plan, destination_filesystem=s3)
    report = classify_files(replace(config, adapter=None, plan=f"s3://{plan}"))
    assert report.is_complete
    assert {answer.partition(" ")[0] for answer in report.totals.answered_by} == {"0", "1", "2"}
    again = classify_files(replace(config, adapter=None, plan=f"s3://{plan}/plan.json"))
    assert again.resumed == report.units


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": "s3://bucket/nothing/*.parquet"}, "cannot find a file for input"),
        ({"input": "s3://nowhere/rows.parquet"}, "nowhere"),
        ({"adapter": "s3://bucket/nothing"}, "cannot read 's3://bucket/nothing'"),
        ({"model": "s3://bucket/nothing"}, "cannot read 's3://bucket/nothing'"),
        ({"plan": "s3://bucket/nothing", "adapter": None}, "cannot read plan"),
        ({"output": "s3://nowhere/out"}, "nowhere"),
    ],
)
def test_mistakes_on_s3_are_one_line(config: BulkConfig, change: dict[str, str | None], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        classify_files(replace(config, **change))
    assert "\n" not in str(refused.value)


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_driver_continues_on_s3(s3: S3FileSystem, config: BulkConfig, tmp_path: Path) -> None:
    """The same command, after the driver was killed, waits until the lease of the killed one has expired."""
    config = replace(config, unit_rows=1, audit=0.0)
    names = ("input", "output", "model", "adapter", "unit_rows")
    flags = [f"--{name}={getattr(config, name)}" for name in names]
    flags += [f"--storage={tmp_path / 'runs'}", "--cluster.workers=1", "--cluster.cpus_per_worker=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "ray_jobs.classify", *flags]
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        wait_until(
            lambda: (
                len(parts(s3, config)) > 10 if s3.get_file_info(config.output.removeprefix("s3://")).type else False
            ),
            failure=lambda: log.read_text() if process.poll() is not None else None,
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = parts(s3, config)
        assert 10 < len(before) < ROWS
        subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=True)
    after = parts(s3, config)
    assert len(after) == ROWS
    assert before.items() <= after.items()
    table = parquet.read_table(config.output.removeprefix("s3://"), filesystem=s3)
    assert table["id"].to_pylist() == list(range(ROWS))
