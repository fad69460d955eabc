"""A tracking server that is away: refused at the start, waited for half-way, and nothing lost."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException, RestException
from polling import wait_until

from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.outbox import LOCAL, is_refusal
from ray_jobs.tracking.tracker import Tracker
from revmux import UserError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """A real tracking server on sqlite, until the end of the body."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: healthy(url),
            failure=lambda: None if process.poll() is None else (folder / "server.log").read_text(),
        )
        yield url
    finally:
        process.terminate()
        process.wait()


def healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_is_down_at_the_start_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open the MLflow store"):
        Tracker(TrackingConfig(f"http://127.0.0.1:{free_port()}"), tmp_path)


def test_a_database_without_its_driver_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r"run: pip install 'revmux\[postgres\]'"):
        Tracker(TrackingConfig("postgresql+psycopg2://me@localhost/runs"), tmp_path)


def test_what_a_server_missed_is_sent_in_order_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, storage = free_port(), tmp_path / "runs"
    adapter = storage / "adapter"
    adapter.mkdir(parents=True)
    with server(tmp_path, port) as url:
        tracker = Tracker(TrackingConfig(url), storage)
        tracked = tracker.run("sweep", {"space": "quick"})
        parent = tracked.__enter__()
        tracker.log_metrics(parent, {"accuracy": 0.5}, 1)

    # It is away: the run goes on, another one begins and ends.
    tracker.log_metrics(parent, {"accuracy": 0.6, "broken": math.nan}, 2)
    with tracker.run("trial", {"num_inputs": 2}, parent) as child:
        assert child.startswith(LOCAL)
        (adapter / "weights").write_text("as trained")
        tracker.log_folder(child, adapter, "adapter")
        tracker.log_data(child, {"source": "mine", "sha256": "0" * 64})
        (adapter / "weights").write_text("changed later")
    tracked.__exit__(None, None, None)
    assert len(tracker.client.outbox) > 4
    assert caplog.text.count("records wait in") == 1

    with server(tmp_path, port) as url:
        again = Tracker(TrackingConfig(url), storage)  # as the next job of this storage folder does
        assert len(again.client.outbox) == 0
        client = MlflowClient(url)
        assert [point.value for point in client.get_metric_history(parent, "accuracy")] == [0.5, 0.6]
        assert math.isnan(client.get_run(parent).data.metrics["broken"])
        assert client.get_run(parent).info.status == "FINISHED"
        (trial,) = again.children(parent)
        assert again.client.get_run(child).info.run_id == trial.info.run_id
        assert (trial.info.run_name, trial.info.status) == ("trial", "FINISHED")
        assert trial.data.params == {"num_inputs": "2"}
        assert trial.inputs.dataset_inputs[0].dataset.name == "mine"
        kept = Path(client.download_artifacts(trial.info.run_id, "adapter/weights", str(tmp_path)))
        assert kept.read_text() == "as trained"


def test_what_a_store_refuses_is_told_at_once(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path)
    with tracker.run("one", {"rate": 1}) as run_id:
        with pytest.raises(MlflowException, match="rate"):
            tracker.client.log_batch(run_id, params=[Param("rate", "2")])
        assert len(tracker.client.outbox) == 0


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}), True),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "oops"}), False),
        (MlflowException("API request failed with exception: connection refused"), False),
        (ConnectionResetError(), False),
        (requests.ConnectionError(), False),
        (TypeError("a mistake in our code"), True),
    ],
)
def test_a_refusal_is_told_from_an_absence(error: Exception, refusal: bool) -> None:
    assert is_refusal(error) is refusal
