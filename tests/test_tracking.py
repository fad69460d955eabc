"""Runs in MLflow: their final status, detection of killed runs, and resumption in the same run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from mlflow.entities import Run

from ray_jobs.tracking.command_line import command_line
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker


@pytest.fixture
def storage(mlflow_database: Path, tmp_path: Path) -> Path:
    shutil.copy(mlflow_database, tmp_path)
    return tmp_path


def tracker_of(storage: Path) -> Tracker:
    return Tracker(TrackingConfig(), storage)


def found(tracker: Tracker, run_id: str) -> Run:
    return tracker.client.get_run(run_id)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (OSError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")],
)
def test_the_status_of_a_run_follows_its_body(error: type[BaseException] | None, status: str, storage: Path) -> None:
    tracker = tracker_of(storage)

    def body() -> None:
        with tracker.run("one", {"rate": 1}) as run_id:
            begun.append(run_id)
            assert found(tracker, run_id).info.status == "RUNNING"
            if error is not None:
                raise error

    begun: list[str] = []
    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    assert found(tracker, begun[0]).info.status == status
    assert not list((storage / "running").iterdir())


def test_a_run_records_the_command_that_repeats_it(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/pytest", "--name", "two words", "--uri", "pg://me:secret@db/runs"])
    command = command_line()
    assert command.startswith("python ")
    assert command.endswith("pytest --name 'two words' --uri pg://me:***@db/runs")
    with tracker_of(storage).run("one", {}) as run_id:
        assert found(tracker_of(storage), run_id).data.tags["revmux.command"] == command


def be_killed(storage: Path, parent: Connection) -> None:
    """A driver that starts a run, prints its id, and is killed during the run."""
    with tracker_of(storage).run("one", {"rate": 1, "workers": 2}) as run_id:
        parent.send(run_id)
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_job_detects_a_run_whose_driver_was_killed_and_resumes_it(storage: Path) -> None:
    tracker = tracker_of(storage)
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    driver = context.Process(target=be_killed, args=(storage, there))
    with tracker.run("beside", {}) as beside:
        driver.start()
        driver.join()
        assert driver.exitcode == -signal.SIGKILL
        killed = here.recv()
        assert found(tracker, killed).info.status == "RUNNING"

        again = tracker_of(storage)
        assert found(again, killed).info.status == "KILLED"
        assert "without reporting a status" in found(again, killed).data.tags["revmux.killed"]
        assert found(again, beside).info.status == "RUNNING", "its process is still alive"

    with again.run("one", {"rate": 1, "workers": 4, "more": "new"}, resume=killed) as run_id:
        assert run_id == killed
        assert found(again, killed).info.status == "RUNNING"
        tracker_of(storage)
        assert found(again, killed).info.status == "RUNNING"
    run = found(again, killed)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rate": "1", "workers": "2", "more": "new"}
    assert run.data.tags["revmux.changed"] == "workers: 2 → 4"
    assert not list((storage / "running").iterdir())


def test_the_marker_of_a_deleted_run_is_removed(storage: Path) -> None:
    (storage / "running").mkdir()
    (storage / "running" / ("0" * 32)).touch()
    tracker_of(storage)
    assert not list((storage / "running").iterdir())
