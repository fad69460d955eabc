"""Jobs whose storage is on S3, which moto's server stands in for on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from polling import check_end, wait_until
from pyarrow.fs import FileSelector, FileType, S3FileSystem, copy_files
from ray_machines import Machines, cluster_of_machines, kill_group
from safetensors.torch import load

from ray_jobs import cli, finetune, plan, tune
from ray_jobs.planning.config import PlanJob
from ray_jobs.sweep.config import TuneJob
from ray_jobs.tracking import outbox as outbox_module
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.config import FinetuneJob
from revmux import UserError
from revmux.bulk.config import BulkConfig
from revmux.bulk.system import adapter_sources
from revmux.training.checkpoint import CheckpointFolder
from revmux.utils.stored_folder import publish_folder, reading_folder, writing_folder

ROOT = Path(__file__).parents[1]
STEPS_PER_CHECKPOINT = 7


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s3-", dir="/tmp") as folder:  # Ray's socket paths must stay short
        yield Path(folder)


@pytest.fixture
def bucket(s3: S3FileSystem, tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path) -> str:
    """The URI of a folder with a model and data."""
    place = f"bucket/{tmp_path.name}"
    copy_files(str(tiny_model_folder), f"{place}/model", destination_filesystem=s3)
    copy_files(str(tiny_csv), f"{place}/tiny.csv", destination_filesystem=s3)
    return f"s3://{place}"


def files(s3: S3FileSystem, uri: str, pattern: str = "") -> list[str]:
    found = s3.get_file_info(FileSelector(uri.removeprefix("s3://"), recursive=True, allow_not_found=True))
    return [info.path for info in found if info.type == FileType.File and re.search(pattern, info.path)]


def put_lease(s3: S3FileSystem, uri: str, expires: float) -> None:
    """Write the lease of another process."""
    with s3.open_output_stream(uri.removeprefix("s3://")) as stream:
        stream.write(json.dumps({"holder": "another", "renewed": 0.0, "expires": expires}).encode())


def test_checkpoints_are_kept_verified_and_written_by_one_process(s3: S3FileSystem, bucket: str) -> None:
    run = f"{bucket}/run"
    folder = CheckpointFolder(run)
    assert folder.load() is None
    with folder.locked():
        for step in (1, 2, 3):
            folder.save(step, {"weights": torch.arange(step)}, {"w": torch.tensor(1)}, best_epoch=1)
        assert {path.rpartition("/")[2] for path in files(s3, run, r"\.(pt|json)$")} == {
            *(f"step-0000000{step}.{suffix}" for step in (2, 3) for suffix in ("pt", "json")),
            "best-00000001.pt",
        }
        with s3.open_output_stream(f"{run}/step-00000003.pt".removeprefix("s3://")) as stream:
            stream.write(b"damaged")
        found = CheckpointFolder(run).load()
        assert found is not None
        assert (found.step, found.state["weights"].tolist()) == (2, [0, 1])
        put_lease(s3, f"{run}/.lock", time.time() + 1000)
        with pytest.raises(UserError, match="another process continues this run"):
            folder.save(4, {}, {}, best_epoch=1)
    assert not files(s3, run, "step-00000004")
    folder.remove()
    assert not files(s3, run)


def test_a_result_replaces_the_former_one_and_is_complete_when_its_config_exists(
    s3: S3FileSystem, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"{bucket}/adapter"
    with writing_folder(target) as folder:
        for name in ("adapter_config.json", "weights", "former"):
            (folder / name).write_text("first")
    (tmp_path / "new/below").mkdir(parents=True)
    for name in ("adapter_config.json", "below/weights", "weights"):
        (tmp_path / "new" / name).write_text("second")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError("the network is away")))
        with pytest.raises(UserError, match="the network is away"):
            publish_folder(tmp_path / "new", target)
    assert not files(s3, target, "adapter_config")
    publish_folder(tmp_path / "new", target)
    with reading_folder(target) as copied:
        texts = {path.relative_to(copied).as_posix(): path.read_text() for path in copied.rglob("*") if path.is_file()}
    assert texts == dict.fromkeys(("adapter_config.json", "below/weights", "weights"), "second")


def test_a_killed_run_is_found_by_its_lease_and_records_wait_on_the_store(
    s3: S3FileSystem, bucket: str, mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, storage = tmp_path / "mlflow.db", f"{bucket}/runs"
    database.write_bytes(mlflow_database.read_bytes())
    monkeypatch.setattr(outbox_module, "RETRY_SECONDS", 0.0)
    config = TrackingConfig(f"sqlite:///{database}")
    tracker = Tracker(config, storage)
    killed = tracker.client.create_run(tracker.experiment_id, "killed", {}).info.run_id

    def status(run_id: str) -> str:
        return str(MlflowClient(config.uri).get_run(run_id).info.status)

    with tracker.run("alive", {}) as alive:
        put_lease(s3, f"{storage}/running/{killed}", 0.0)
        Tracker(config, storage)
        assert (status(killed), status(alive)) == ("KILLED", "RUNNING")
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter/weights").write_text("as trained")

        def fail(*_: Any) -> None:
            raise ConnectionError("the server is away")

        with monkeypatch.context() as patch:
            for name in ("log_artifacts", "log_batch", "search_experiments"):
                patch.setattr(tracker.client.plain, name, fail)
            tracker.log_folder(alive, tmp_path / "adapter", "adapter")
            tracker.log_metrics(alive, {"loss": 0.5})
            assert len(tracker.client.outbox) == 2
        (tmp_path / "adapter/weights").write_text("changed later")
    assert status(alive) == "FINISHED"
    assert not files(s3, f"{storage}/running")
    client = Tracker(config, storage).client  # sends what waits
    assert client.get_run(alive).data.metrics == {"loss": 0.5}
    assert Path(client.download_artifacts(alive, "adapter/weights", str(tmp_path))).read_text() == "as trained"
    assert not files(s3, f"{storage}/outbox", r"\.json|files")


def own_environment(folder: Path) -> dict[str, str]:
    """The environment of a machine that shares no folder with others."""
    (folder / "tmp").mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # on a busy machine, workers of a lower priority would not start in time
    }


@pytest.fixture
def machines(folder: Path) -> Iterator[Machines]:
    """Two machines with one core each and without a common disk."""
    with cluster_of_machines(folder, own_environment(folder / "head") | {"HOME": str(folder)}) as machines:
        shared = {"RAY_AUTH_TOKEN_PATH": str(folder / ".ray/auth_token")}  # the token, which each machine has
        machines.environment = {**machines.environment, **own_environment(folder / "second"), **shared}
        machines.add()
        yield machines


def train(bucket: str, storage: str, database: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "ray_jobs.train", "--backbone.model", f"{bucket}/model", "--data.source"]
    command += [f"{bucket}/tiny.csv", "--storage", storage, "--tracking.uri", f"sqlite:///{database}"]
    command += ["--backbone.max_length", "16", "--num_inputs", "[2]", "--method.prefill_layers", "1", "--shuffles", "2"]
    command += ["--optim.epochs", "10", "--optim.batch_size", "4", "--checkpoint.steps", str(STEPS_PER_CHECKPOINT)]
    return [*command, *more]


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_without_a_common_disk_continues_after_its_driver_was_killed(
    s3: S3FileSystem, bucket: str, machines: Machines, folder: Path, mlflow_database: Path
) -> None:
    database, log = folder / "mlflow.db", folder / "job.log"
    database.write_bytes(mlflow_database.read_bytes())
    environment = machines.environment | own_environment(folder / "driver")

    def started(*flags: str) -> subprocess.Popen:
        with log.open("w") as output:
            return subprocess.Popen(
                [*train(bucket, *flags), "--cluster.address", machines.address],
                env=environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def weights(storage: str) -> dict:
        path = f"{storage}/adapters/revmux-n2-l1/adapter_model.safetensors".removeprefix("s3://")
        return load(s3.open_input_file(path).readall())

    interrupted, undisturbed = f"{bucket}/interrupted", f"{bucket}/undisturbed"
    process = started(interrupted, str(database))
    try:
        wait_until(
            lambda: files(s3, interrupted, r"checkpoints/.*/step-\d*\.json"),
            seconds=200,
            failure=lambda: log.read_text() if process.poll() is not None else None,
        )
        assert "2 workers (gloo" in log.read_text()
    finally:
        kill_group(process)
    assert not files(s3, interrupted, "adapters/")
    for storage in (interrupted, undisturbed):
        process = started(storage, str(database))
        try:
            check_end(process, log)
        finally:
            kill_group(process)
        starts = re.findall(r"each\), step (\d+) of", log.read_text())
        assert {int(step) > 0 for step in starts} == {storage == interrupted}, log.read_text()  # each node prints it
    assert {name: value.tolist() for name, value in weights(interrupted).items()} == {
        name: value.tolist() for name, value in weights(undisturbed).items()
    }
    assert not files(s3, interrupted, "/(checkpoints|running)/")
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2, "the second start continued the run of the first"
    assert all(client.list_artifacts(run.info.run_id, "adapter") for run in runs)


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_task_model_a_sweep_and_a_plan_are_on_the_store(
    s3: S3FileSystem, bucket: str, mlflow_database: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    database, space, storage = folder / "mlflow.db", folder / "space.yaml", f"{bucket}/runs"
    database.write_bytes(mlflow_database.read_bytes())
    space.write_text("{num_inputs: [2, 4], prefill_layers: [1], infonce_weight: [0.25], epochs: 1}")
    common = ["--data.source", f"{bucket}/tiny.csv", "--storage", storage, "--tracking.uri", f"sqlite:///{database}"]
    common += ["--backbone.max_length", "16", "--optim.batch_size", "8", "--cluster.workers", "1"]
    first = ["--backbone.model", f"{bucket}/model", "--optim.epochs", "1"]
    assert cli.run(finetune.main, FinetuneJob, None, [*common, *first]) == 0
    swept = [*common, "--backbone.model", f"{storage}/task-model", "--space", str(space), "--shuffles", "1"]
    swept += ["--name", "one", "--concurrent_trials", "1"]
    assert cli.run(tune.main, TuneJob, None, swept) == 0
    # The plan continues the sweep of the same name only on its own data; here it runs another one.
    measured = ["--measure.throughput_inputs", "0", "--measure.thresholds", "[0.0]", "--goal.allowance", "100"]
    assert cli.run(plan.main, PlanJob, None, [*swept, *measured, "--name", "two"]) == 0
    rows = [json.loads(s3.open_input_file(path).readall()) for path in files(s3, storage, "sweeps/one/rows/")]
    assert [row["status"] for row in rows] == ["done", "done"]
    assert all(row["adapter"].startswith(f"{storage}/sweeps/one/trials/") for row in rows)
    assert files(s3, storage, r"sweeps/one/(sweep\.json|front\.png)$")
    place = f"{storage}/plans/two"
    written = json.loads(s3.open_input_file(f"{place}/plan.json".removeprefix("s3://")).readall())
    assert written["registered"]["versions"]
    page = yaml.safe_load(s3.open_input_file(f"{place}/serve.yaml".removeprefix("s3://")).readall())
    assert page["applications"][0]["args"]["adapters"][-1] == "models:/plan@champion"
    config = BulkConfig(input="rows.csv", output="out", plan=place)
    assert all(files(s3, source, "adapter_config.json") for source in adapter_sources(config))
    assert not files(s3, storage, "/(checkpoints|running)/")
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "space.yaml"}, "nothing else was written here"
