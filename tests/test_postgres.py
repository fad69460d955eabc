"""PostgreSQL as MLflow's store, selected by its URI: Debian's server, started and stopped by the test."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from mlflow import MlflowClient

from ray_jobs.sweep.comparison import record_comparison
from ray_jobs.sweep.trials import TrialRow
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker

pytest.importorskip("psycopg2", reason="the PostgreSQL driver is not installed; run: pip install 'revmux[postgres]'")
BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=None)
if BINARIES is None or not (BINARIES / "initdb").is_file():
    pytest.skip("PostgreSQL is not installed; install it, for example: apt install postgresql", allow_module_level=True)


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    """A new server on a socket of its owner; PostgreSQL refuses to run as root."""
    owner: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    with TemporaryDirectory(prefix="revmux-pg-", dir="/tmp") as folder:  # socket paths are limited to 107 characters
        if owner:
            shutil.chown(folder, **owner)

        def call(name: str, *flags: str) -> None:
            done = subprocess.run(
                [str(BINARIES / name), "-D", f"{folder}/data", *flags],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                **owner,
            )
            assert done.returncode == 0, done.stdout

        call("initdb", "-U", "revmux", "-A", "trust", "--no-sync")
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", settings)
        try:
            yield f"postgresql+psycopg2://revmux@/postgres?host={folder}"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")


def row(trial: str, num_inputs: int, cost: float, accuracy: float | None) -> TrialRow:
    metrics = {} if accuracy is None else {"accuracy_mean": accuracy, "siso_accuracy": 0.9}
    if accuracy is not None:
        metrics |= {"selection_accuracy": accuracy, "selection_siso_accuracy": 0.9}
    status, why = ("failed", "out of memory") if accuracy is None else ("done", "")
    return TrialRow(trial, "revmux", num_inputs, 3, 0.25, 1e-3, status, why, cost, metrics)


FIGURES = ("accuracy_mean", "siso_accuracy")
ROWS = [row("narrow", 2, 0.8, 0.85), row("wide", 4, 0.6, 0.80), row("lost", 8, 0.5, None)]


@pytest.fixture(scope="module")
def parent(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Record a sweep as the job does: a parent run, a child run per trial, and the comparison."""
    storage = tmp_path_factory.mktemp("runs")
    tracker = Tracker(TrackingConfig(uri), storage)
    with tracker.run("sweep", {"space": "quick"}) as parent:
        for one in ROWS:
            with tracker.run(
                one.trial, {"num_inputs": one.num_inputs, "recipe": {"optim": {"epochs": 3}}}, parent
            ) as child:
                for epoch, accuracy in enumerate((0.5, 0.7), 1):
                    tracker.log_metrics(child, {"selection_accuracy": accuracy}, epoch)
                tracker.log_metrics(child, {name: one.metrics[name] for name in FIGURES if name in one.metrics})
                tracker.log_data(child, {"source": "mine", "sha256": "0" * 64})
        record_comparison(tracker, parent, ROWS, storage / "sweep", "a sweep on PostgreSQL")
    assert len(tracker.client.outbox) == 0
    return parent


def test_a_sweep_can_be_compared_from_the_database(uri: str, parent: str) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    children = client.search_runs(
        [experiment.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent}' and metrics.accuracy_mean > 0",
        order_by=["metrics.accuracy_mean DESC"],
    )
    assert [run.info.run_name for run in children] == ["narrow", "wide"]
    assert [run.data.params["num_inputs"] for run in children] == ["2", "4"]
    history = client.get_metric_history(children[0].info.run_id, "selection_accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.7)]
    assert children[0].inputs.dataset_inputs[0].dataset.name == "mine"


def test_every_child_run_has_the_same_keys_and_the_parent_run_has_the_front(uri: str, parent: str) -> None:
    client = MlflowClient(uri)
    children = Tracker(TrackingConfig(uri), Path("unused")).children(parent)
    assert {run.info.run_name for run in children} == {"narrow", "wide", "lost"}
    (metrics,) = {frozenset(run.data.metrics) for run in children}
    assert metrics == {"selection_accuracy", "accuracy_mean", "siso_accuracy"}
    assert [math.isnan(run.data.metrics["accuracy_mean"]) for run in children] == [False, False, True]
    front = client.get_metric_history(parent, "front_cost")
    assert [point.value for point in front] == [0.6, 0.8, 1.0]
    assert {item.path for item in client.list_artifacts(parent)} >= {"front.html", "front.png", "sweep.json"}


def test_a_version_is_found_by_its_alias(uri: str, parent: str) -> None:
    client = MlflowClient(uri)
    client.create_registered_model("reviews")
    version = client.create_model_version("reviews", client.get_run(parent).info.artifact_uri, parent)
    client.set_registered_model_alias("reviews", "champion", str(version.version))
    assert client.get_model_version_by_alias("reviews", "champion").run_id == parent
