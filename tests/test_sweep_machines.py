"""Sweeps on a cluster of several machines: machines and the head are lost, trials have drivers, and 200 trials are run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from polling import check_end, wait_until
from ray_machines import Machines, cluster_of_machines, environment_in, kill_group, processes_named

ROOT = Path(__file__).parents[1]
TRIAL = "ImplicitFunc"
"""The name of Tune's actors in lists of processes."""

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def machines() -> Iterator[Machines]:
    with (
        tempfile.TemporaryDirectory(prefix="sweep-") as folder,  # not pytest's: Ray's socket paths must stay short
        cluster_of_machines(Path(folder), environment_in(Path(folder))) as machines,
    ):
        yield machines


class Sweep:
    """``python -m ray_jobs.tune`` on a cluster.

    Args:
        machines: the cluster.
        model: task model.
        data: labelled texts.
        points: the search space.
        flags: more flags.
    """

    def __init__(self, machines: Machines, model: Path, data: Path, points: dict[str, Any], *flags: str) -> None:
        self.environment, folder = machines.environment | {"RAY_DEDUP_LOGS": "0"}, machines.folder
        self.log, self.runs = folder / "sweep.log", folder / "runs"
        space = folder / "space.yaml"
        space.write_text(json.dumps(points))
        self.command = [sys.executable, "-m", "ray_jobs.tune", f"--space={space}", f"--storage={self.runs}"]
        self.command += [f"--backbone.model={model}", "--backbone.max_length=16", f"--data.source={data}"]
        self.command += [f"--cluster.address={machines.address}", "--shuffles=1", "--optim.batch_size=8", *flags]

    @contextmanager
    def started(self) -> Iterator[Callable[..., Any]]:
        """Start the sweep; yield a function that waits for a condition or, without one, for the end."""
        with self.log.open("a") as out:
            driver = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

        def wait(condition: Callable[[], Any] | None = None) -> Any:
            if condition is None:
                check_end(driver, self.log)
                return None
            failure = lambda: None if driver.poll() is None else self.log.read_text()  # noqa: E731
            return wait_until(condition, 400, failure=failure)

        try:
            yield wait
        finally:
            kill_group(driver)

    def epochs(self) -> dict[str, int]:
        """The number of epochs that each trial has reported."""
        return {file.stem: len(json.loads(file.read_text())) for file in self.runs.glob("sweeps/sweep/curves/*.json")}

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in self.runs.glob("sweeps/sweep/rows/*.json")]


def test_a_trial_survives_more_losses_of_machines_than_max_failures(
    machines: Machines, tiny_model_folder: Path, tiny_csv: Path
) -> None:
    points = {"methods": ["exit-head"], "exit_layers": [1], "epochs": 200}
    flags = ["--cluster.max_failures=1", "--cluster.resources_per_worker={spot: 1}"]
    sweep = Sweep(machines, tiny_model_folder, tiny_csv, points, *flags)
    spot = machines.add('--resources={"spot": 1}')
    with sweep.started() as wait:
        for _ in range(2):
            before = sum(sweep.epochs().values())
            wait(lambda before=before: sum(sweep.epochs().values()) > before + 2)
            machines.lose(spot)
            spot = machines.add('--resources={"spot": 1}')
        wait()
    log = sweep.log.read_text()
    assert [row["status"] for row in sweep.rows()] == ["done"], log
    assert log.count("continues in another process: its process was lost") == 2, log
    assert len(re.findall(r"1 worker \(cpu, 1 thread each\), step [1-9]", log)) >= 2, "from its last checkpoint"


def test_the_same_command_continues_after_the_head_was_killed_and_keeps_the_history(
    machines: Machines, tiny_model_folder: Path, tiny_csv: Path
) -> None:
    points = {"methods": ["exit-head"], "exit_layers": [1, 2], "epochs": 60, "learning_rate": [0.02, 1e-9]}
    sweep = Sweep(machines, tiny_model_folder, tiny_csv, points, "--concurrent_trials=1", "--stopping.deviations=0.1")
    machines.add()
    with sweep.started() as wait:
        wait(lambda: len(sweep.rows()) == 2)
    earlier = {row["trial"]: row for row in sweep.rows()}
    (good,) = [row["trial"] for row in earlier.values() if row["learning_rate"] == 0.02]  # the cheaper ones came first
    machines.replace_head()
    with sweep.started() as wait:
        wait()
    rows = {row["trial"]: row for row in sweep.rows()}
    assert len(rows) == 4
    assert {name: rows[name] for name in earlier} == earlier
    (bad,) = [row for row in rows.values() if (row["prefill_layers"], row["learning_rate"]) == (2, 1e-9)]
    assert bad["status"] == "stopped"
    assert f"while that of {good} was" in bad["why"], "a trial of the first start"
    client = MlflowClient(f"sqlite:///{sweep.runs}/mlflow.db")
    assert client.get_run(bad["run_id"]).data.tags["revmux.why"] == bad["why"]


def test_drivers_of_trials_run_on_nodes_with_their_labels(
    machines: Machines, tiny_model_folder: Path, tiny_csv: Path
) -> None:
    points = {"methods": ["exit-head"], "exit_layers": [1], "epochs": 15}
    drivers = machines.add("--num-cpus=0", "--labels=role=drivers")
    machines.add()
    flags = ["--cluster.workers=2", "--cluster.driver_labels={role: drivers}", "--cluster.driver_memory=0.1"]
    sweep = Sweep(machines, tiny_model_folder, tiny_csv, points, *flags)
    with sweep.started() as wait:
        wait(lambda: sweep.epochs() and max(sweep.epochs().values()) > 2)
        assert processes_named(TRIAL, drivers.pid)
        wait()
    log = sweep.log.read_text()
    assert [row["status"] for row in sweep.rows()] == ["done"], log
    assert "sweep: warning: one trial runs at a time" not in log, "there is only one"


def test_200_trials_on_two_machines(machines: Machines, tiny_model_folder: Path, tiny_csv: Path) -> None:
    rates = [round(0.001 * (1 + index), 3) for index in range(100)]
    points = {"methods": ["exit-head"], "exit_layers": [1, 2], "epochs": 1, "learning_rate": rates}
    sweep = Sweep(machines, tiny_model_folder, tiny_csv, points)
    machines.add()
    with sweep.started() as wait:
        wait()
    log, rows = sweep.log.read_text(), sweep.rows()
    assert [row["status"] for row in rows] == ["done"] * 200, log
    assert len({(row["prefill_layers"], row["learning_rate"]) for row in rows}) == 200
    assert len(set(re.findall(r"run_trial pid=(\d+)", log))) == 2, "one process per machine runs all its trials"
    client = MlflowClient(f"sqlite:///{sweep.runs}/mlflow.db")
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    recorded = client.search_runs([experiment.experiment_id], max_results=1000)
    children = {run.info.run_id for run in recorded if "mlflow.parentRunId" in run.data.tags}
    assert children == {row["run_id"] for row in rows}
