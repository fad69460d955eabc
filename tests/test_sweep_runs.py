"""Sweeps on a real Ray cluster: processes that run several trials, and trials that are lost, stopped, or fail."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from mlflow import MlflowClient
from polling import check_end, wait_until

from benchmarks.trained import fill_store
from ray_jobs.cluster import ClusterConfig
from ray_jobs.sweep.comparison import ENDS
from ray_jobs.sweep.config import StoppingConfig, TuneJob
from ray_jobs.tune import main
from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import OptimConfig, Recipe

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
TWO_RATES = {"methods": ["exit-head"], "exit_layers": [1, 2], "learning_rate": [0.02, 1e-9]}
"""The second rate learns nothing, so at least its last trial is stopped."""

pytestmark = [pytest.mark.cluster("shared"), pytest.mark.timeout(600)]


@pytest.fixture
def job(
    tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TuneJob]:
    """Return a sweep over points, for this process."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)

    def make(points: dict[str, Any], **settings: Any) -> TuneJob:
        space = tmp_path / "space.yaml"
        space.write_text(json.dumps(points))
        return TuneJob(
            BackboneConfig(model=str(tiny_model_folder), max_length=16),
            DataConfig(source=str(tiny_csv)),
            space=str(space),
            optim=OptimConfig(batch_size=8),
            store=StoreConfig(root=str(tmp_path / "store")),
            shuffles=1,
            storage=str(tmp_path / "runs"),
            **settings,
        )

    return make


@pytest.fixture
def command(tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return the command of a sweep over points, one trial at a time."""

    def make(points: dict[str, Any], **flags: Any) -> list[str]:
        space = tmp_path / "space.yaml"
        space.write_text(json.dumps(points))
        settings = {
            "backbone.model": tiny_model_folder,
            "backbone.max_length": 16,
            "data.source": tiny_csv,
            "space": space,
            "storage": tmp_path / "runs",
            "store.root": tmp_path / "store",
            "optim.batch_size": 8,
            "shuffles": 1,
            "concurrent_trials": 1,
        } | {name.replace("__", "."): value for name, value in flags.items()}
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        return [sys.executable, "-m", "ray_jobs.tune", *words]

    return make


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with all output in ``stdout``."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def table_of(runs: Path) -> list[dict[str, Any]]:
    """Return the rows of a finished sweep."""
    rows: list[dict[str, Any]] = json.loads((runs / "sweeps/sweep/sweep.json").read_text())
    return rows


@pytest.mark.long
def test_a_trial_without_enough_memory_fails_at_once_and_the_sweep_continues(
    job: Callable[..., TuneJob], tmp_path: Path
) -> None:
    options = {"token-split": {"pooling_width": 10**12}}
    points = {"methods": ["token-split", "exit-head"], "exit_layers": [1], "epochs": 1, "options": options}
    rows = {row.method: row for row in main(job(points))}
    assert (rows["exit-head"].status, rows["token-split"].status) == ("done", "failed")
    assert rows["token-split"].why.startswith("UserError: out of memory (")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    statuses = {name: client.get_run(str(row.run_id)).info.status for name, row in rows.items()}
    assert statuses == {"exit-head": "FINISHED", "token-split": "FAILED"}


def fill(job: TuneJob) -> None:
    """Store the states of layers 1 and 2 without a cluster, so that a sweep on one has nothing left to store."""
    task = load_task(job.data)
    for split in (task.train, task.selection, task.test):
        fill_store(Recipe(job.backbone, job.data, store=job.store), split, [1, 2])


def test_a_sweep_reports_missing_machines_and_ends(
    job: Callable[..., TuneJob], ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features have been stored before: otherwise the feature pass would already report the missing machines."""
    points = {"methods": ["exit-head"], "exit_layers": [1], "epochs": 1}
    monkeypatch.setattr("ray_jobs.sweep.run.fill_stores_for", lambda *_: None)
    cores = ray.cluster_resources()["CPU"]
    cluster = ClusterConfig(address="auto", workers=1, cpus_per_worker=cores + 1, wait_minutes=0.05)
    words = rf"few resources for the workers of the sweep .*: 1 × {cores + 1:g} CPU; the cluster has {cores:g} CPU"
    with pytest.raises(UserError, match=words):
        main(job(points, cluster=cluster))


@pytest.mark.long
def test_trials_ended_by_the_memory_monitor_are_reported_and_counted(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    points = {"methods": ["exit-head"], "exit_layers": [1, 2], "epochs": 60}
    # So that any process exceeds it.
    done = run(command(points, cluster__max_failures=0), RAY_memory_usage_threshold="0.01")
    assert done.returncode == 2, done.stdout
    assert "none of the 2 trials finished (" in done.stdout
    table = table_of(tmp_path / "runs")
    assert [row["status"] for row in table] == ["failed", "failed"]
    assert all(row["why"].startswith("Ray ended its process because the machine ran out of memory") for row in table)


@pytest.mark.long
def test_trials_with_several_workers_can_be_stopped_and_completed(job: Callable[..., TuneJob], tmp_path: Path) -> None:
    cluster = ClusterConfig(address="local", workers=2)
    rows = main(job(TWO_RATES | {"epochs": 20}, stopping=StoppingConfig(deviations=0.1), cluster=cluster))
    status = {(row.prefill_layers, row.learning_rate): row.status for row in rows}
    assert len(rows) == len(status) == 4
    assert status[1, 0.02] == "done"
    assert status[2, 1e-9] == "stopped"
    assert set(status.values()) == {"done", "stopped"}
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert all(client.get_run(str(row.run_id)).info.status == ENDS[row.status] for row in rows)


def trial_process() -> psutil.Process | None:
    """Return the process on this test's cluster that trains a trial."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "ImplicitFunc" in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def test_a_process_runs_several_trials_and_a_lost_process_is_replaced(
    job: Callable[..., TuneJob], command: Callable[..., list[str]], ray_here: None, tmp_path: Path
) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log.txt"
    fill(job(TWO_RATES))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    words = command(TWO_RATES | {"epochs": 60}, stopping__deviations=0.1)
    with log.open("w") as out:
        driver = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        found = wait_until(
            lambda: list(runs.glob("sweeps/sweep/checkpoints/*/step-*.json")) and trial_process(),
            240,
            every=0.005,
            failure=lambda: None if driver.poll() is None else log.read_text(),
        )
        found.kill()  # type: ignore[union-attr]
        check_end(driver, log)
    finally:
        driver.kill()
        driver.wait()

    text = log.read_text()
    table = table_of(runs)
    status = {(row["prefill_layers"], row["learning_rate"]): row["status"] for row in table}
    assert len(table) == len(status) == 4
    assert status[1, 0.02] == "done"
    assert status[2, 1e-9] == "stopped"
    assert set(status.values()) == {"done", "stopped"}
    assert "continues in another process: its process was lost" in text
    assert re.search(r"1 worker \(cpu, 1 thread each\), step [1-9]", text), "from its last checkpoint"
    assert len(set(re.findall(r"run_trial pid=(\d+)", text))) == 2, "the lost process and its replacement"
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    for row in table:
        child = client.get_run(row["run_id"])
        assert child.info.status == ENDS[row["status"]]
        assert child.data.tags["revmux.command"] == f"python {shlex.join(words[1:])}"


@pytest.mark.long
def test_a_killed_sweep_resumes_and_runs_each_trial_once(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """One command run twice: killed after its first trial, then run to the end, with failing trials."""
    points = {
        "methods": ["revmux", "exit-head"],
        "num_inputs": [2],
        "prefill_layers": [1],
        "exit_layers": [2],
        "epochs": 2,
    }
    # The second rate diverges.
    words = command(points | {"learning_rate": [0.01, 1.0e38]}, stopping__reduction=2)
    rows = tmp_path / "runs" / "sweeps" / "sweep" / "rows"

    first = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(
        lambda: list(rows.glob("*.json")),
        300,
        failure=lambda: None if first.poll() is None else first.stdout.read().decode(),  # type: ignore[union-attr]
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {file.name: file.read_text() for file in rows.glob("*.json")}

    done = run(words)
    assert done.returncode == 0, done.stdout
    for name, content in kept.items():
        assert (rows / name).read_text() == content
    table = table_of(tmp_path / "runs")
    assert len({row["trial"] for row in table}) == len(table) == 4
    failed = [row for row in table if row["learning_rate"] > 1]
    assert {row["status"] for row in failed} == {"failed"}
    assert all("training loss became" in row["why"] for row in failed)
    assert [row["status"] for row in table if row["learning_rate"] < 1] == ["done", "done"]
    assert {path.name for path in rows.parent.glob("front.*")} == {"front.json", "front.png", "front.html"}
    assert "2 done, 0 stopped, 2 failed" in done.stdout

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    recorded = client.search_runs([experiment.experiment_id])
    (parent,) = [one for one in recorded if one.info.run_name == "sweep"]
    children = [one for one in recorded if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(one.info.run_name for one in children) == sorted(row["trial"] for row in table)
    assert {one.info.status for one in children} == {"FINISHED", "FAILED"}
    for keys in ("params", "metrics"):
        (same,) = {
            frozenset(key for key in getattr(one.data, keys) if not key.startswith("system/")) for one in children
        }
        assert {"recipe.method.options.layer", "accuracy_mean"} & same
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} >= {
        "front.html",
        "front.png",
        "sweep.json",
    }
    accuracies = {one.info.run_name: one.data.metrics["accuracy_mean"] for one in children}
    assert [math.isnan(accuracies[row["trial"]]) for row in table] == [row["status"] == "failed" for row in table]
