"""An unreachable tracking server: an error at the start, a retry later, and no lost records."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import (
    BAD_REQUEST,
    ENDPOINT_NOT_FOUND,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    REQUEST_LIMIT_EXCEEDED,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
    UNAUTHENTICATED,
    ErrorCode,
)
from polling import wait_until

from ray_jobs.tracking import outbox as outbox_module
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.outbox import LOCAL, BufferedClient, Outbox, is_refusal
from ray_jobs.tracking.tracker import Tracker
from revmux import UserError


@pytest.fixture(autouse=True)
def _empty_store(mlflow_database: Path, tmp_path: Path) -> None:
    shutil.copy(mlflow_database, tmp_path)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """Run a real tracking server on sqlite."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
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


def test_a_database_without_its_driver_is_refused_with_the_name_of_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r"run: pip install 'revmux\[postgres\]'"):
        Tracker(TrackingConfig("postgresql+psycopg2://me@localhost/runs"), tmp_path)


def test_records_are_sent_in_order_when_the_server_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port, storage = free_port(), tmp_path / "runs"
    adapter = storage / "adapter"
    adapter.mkdir(parents=True)
    with server(tmp_path, port) as url:
        tracker = Tracker(TrackingConfig(url), storage)
        tracked = tracker.run("sweep", {"space": "quick"})
        parent = tracked.__enter__()
        tracker.log_metrics(parent, {"accuracy": 0.5}, 1)

    # The server is unreachable: the run continues, and another one starts and ends.
    tracker.log_metrics(parent, {"accuracy": 0.6, "broken": math.nan}, 2)
    with tracker.run("trial", {"num_inputs": 2}, parent) as child:
        assert child.startswith(LOCAL)
        (adapter / "weights").write_text("as trained")
        tracker.log_folder(child, adapter, "adapter")
        tracker.log_data(child, {"source": "mine", "sha256": "0" * 64})
        (adapter / "weights").write_text("changed later")
    tracked.__exit__(None, None, None)
    assert len(tracker.client.outbox) > 4
    assert caplog.text.count("records are kept in") == 1

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


def test_a_record_that_the_store_refuses_is_reported_at_once(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path)
    with tracker.run("one", {"rate": 1}) as run_id:
        with pytest.raises(MlflowException, match="rate"):
            tracker.client.log_batch(run_id, params=[Param("rate", "2")])
        assert len(tracker.client.outbox) == 0


class ObjectStoreError(Exception):
    """An error as object-store libraries raise it, which MLflow passes on."""


def coded(code: int, kind: type[MlflowException] = MlflowException) -> MlflowException:
    """An error of MLflow with a code, raised by a store in this process or by a server."""
    name = ErrorCode.Name(code)
    return MlflowException("no", code) if kind is MlflowException else kind({"error_code": name, "message": "no"})


@pytest.mark.parametrize("kind", [MlflowException, RestException])
@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        (INVALID_PARAMETER_VALUE, True),
        (RESOURCE_DOES_NOT_EXIST, True),
        (RESOURCE_ALREADY_EXISTS, True),
        (BAD_REQUEST, True),
        (INTERNAL_ERROR, False),
        (REQUEST_LIMIT_EXCEEDED, False),
        (UNAUTHENTICATED, False),
        (PERMISSION_DENIED, False),
        (TEMPORARILY_UNAVAILABLE, False),
        (ENDPOINT_NOT_FOUND, False),  # a proxy in front of an unreachable server returns this
    ],
)
def test_only_permanent_errors_of_mlflow_count_as_a_refusal(
    code: int, refusal: bool, kind: type[MlflowException]
) -> None:
    assert is_refusal(coded(code, kind)) is refusal


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (MlflowException("API request failed with exception: connection refused"), False),
        (ConnectionResetError(), False),
        (requests.ConnectionError(), False),
        (ObjectStoreError("SlowDown"), False),
        (TypeError("a mistake in our code"), True),
        (UserError("not an adapter folder"), True),
    ],
)
def test_a_refusal_is_distinguished_from_an_unreachable_server(error: Exception, refusal: bool) -> None:
    assert is_refusal(error) is refusal


class Faulty:
    """MLflow's client of a real store that fails on demand.

    Attributes:
        fault: called with the name of a call and its arguments; the error that it returns is raised.
    """

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.fault: Callable[..., Exception | None] = lambda call, *args: None

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if error := self.fault(name, *args):
                raise error
            return getattr(self.client, name)(*args, **options)

        return call


@dataclass
class Case:
    """An outbox before a real store that fails on demand."""

    store: MlflowClient
    faulty: Faulty
    outbox: Outbox
    experiment: str

    def make_run(self) -> str:
        return str(self.store.create_run(self.experiment).info.run_id)

    def log(self, run_id: str, value: float, step: int = 0, outbox: Outbox | None = None) -> None:
        (outbox or self.outbox).send("batch", run_id, metrics=[["loss", repr(value), 0, step]], params=[])

    def losses(self, run_id: str) -> list[float]:
        return [point.value for point in self.store.get_metric_history(run_id, "loss")]

    def names(self, folder: str = "") -> list[str]:
        return [
            json.loads(path.read_text())["call"] for path in sorted((self.outbox.folder / folder).glob("[0-9]*.json"))
        ]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(outbox_module, "RETRY_SECONDS", 0.0)
    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    faulty = Faulty(store)
    location = (tmp_path / "artifacts").as_uri()
    return Case(store, faulty, Outbox(tmp_path / "outbox", faulty), store.create_experiment("mine", location))


def away(call: str, *_: Any) -> Exception:
    return ConnectionError("the server is away")


@pytest.mark.parametrize(
    "error", [ObjectStoreError("SlowDown"), coded(REQUEST_LIMIT_EXCEEDED), coded(UNAUTHENTICATED, RestException)]
)
def test_artifacts_wait_while_their_store_fails_and_do_not_block_other_records(
    error: Exception, case: Case, tmp_path: Path
) -> None:
    run_id, adapter = case.make_run(), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_text("as trained")
    case.faulty.fault = lambda call, *_: error if call == "log_artifacts" else None
    case.outbox.send("artifacts", run_id, path=str(adapter), artifact_path="adapter")
    (adapter / "weights").write_text("changed later")
    case.log(run_id, 0.5)
    assert case.losses(run_id) == [0.5]
    assert case.names() == ["artifacts"]
    case.faulty.fault = lambda call, *_: None
    assert case.outbox.flush() == 0
    kept = case.store.download_artifacts(run_id, "adapter/weights", str(tmp_path))
    assert Path(kept).read_text() == "as trained"
    assert not list((case.outbox.folder / "files").iterdir())


@pytest.mark.parametrize("error", [ObjectStoreError("SlowDown"), coded(UNAUTHENTICATED), coded(INTERNAL_ERROR)])
def test_a_finished_training_does_not_fail_when_its_adapter_cannot_be_stored(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("as trained")
    tracker = Tracker(TrackingConfig(), tmp_path)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tracker.client.plain, "log_artifacts", fail)
    with tracker.run("one", {}) as run_id:
        tracker.log_folder(run_id, tmp_path / "adapter", "adapter")
    assert tracker.client.get_run(run_id).info.status == "FINISHED"
    assert len(tracker.client.outbox) == 1
    again = Tracker(TrackingConfig(), tmp_path)  # the next job sends it
    assert len(again.client.outbox) == 0
    assert [item.path for item in again.client.list_artifacts(run_id)] == ["adapter"]


def test_artifact_paths_may_be_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plot.png").write_text("a plot")
    tracker = Tracker(TrackingConfig(), Path("runs").absolute())
    with tracker.run("one", {}) as run_id:
        tracker.client.log_artifact(run_id, "plot.png")
    assert [item.path for item in tracker.client.list_artifacts(run_id)] == ["plot.png"]


def test_a_worker_with_a_slow_clock_records_nothing_before_its_run_is_created(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.faulty.fault = away
    run_id = f"{LOCAL}1"
    case.outbox.send("create", run_id, experiment_id=case.experiment, start_time=0, tags={}, name="one")
    worker, clock, precise = Outbox(case.outbox.folder, case.faulty), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: clock() - 5)
    monkeypatch.setattr(time, "time_ns", lambda: precise() - 5_000_000_000)
    for step in range(12):  # two digits, which sort as numbers
        case.log(run_id, float(step), step, worker)
    case.faulty.fault = lambda call, *_: None
    monkeypatch.undo()
    assert case.outbox.flush() == 0
    assert case.losses(case.outbox.resolve(run_id)) == [float(step) for step in range(12)]
    assert not (case.outbox.folder / "quarantine").exists()


def test_records_of_a_worker_with_an_old_listing_wait_for_their_run(case: Case) -> None:
    case.faulty.fault = away
    run_id = f"{LOCAL}1"
    case.outbox.send("create", run_id, experiment_id=case.experiment, start_time=0, tags={}, name="one")
    (creation,) = case.outbox.folder.glob("[0-9]*.json")
    for step in range(3):
        case.log(run_id, float(step), step)
    creation.rename(creation.with_name(creation.name.replace("1-", "9-", 1)))
    case.faulty.fault = lambda call, *_: None
    assert case.outbox.flush() == 0
    assert case.losses(case.outbox.resolve(run_id)) == [0.0, 1.0, 2.0]
    assert not (case.outbox.folder / "quarantine").exists()


@pytest.mark.parametrize("status", [400, 404, 502])
def test_an_error_page_of_a_proxy_is_not_a_refusal(status: int, tmp_path: Path) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>the service is not here</html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        client = BufferedClient(f"http://127.0.0.1:{proxy.server_port}", tmp_path / "outbox")
        client.log_batch("0" * 32, params=[Param("rate", "2")])
        proxy.shutdown()
        thread.join()
    assert len(client.outbox) == 1


def test_the_records_of_an_earlier_version_are_sent_first(case: Case) -> None:
    run_id = case.make_run()
    case.faulty.fault = away
    case.log(run_id, 1.0, 1)
    (record,) = case.outbox.folder.glob("[0-9]*.json")
    record.rename(record.with_name(f"{time.time_ns():020d}-0123abcd.json"))
    case.log(run_id, 2.0, 2)
    sent: list[Any] = []
    case.faulty.fault = lambda call, *args: sent.append(args[1][0].step) if call == "log_batch" else None
    assert case.outbox.flush() == 0
    assert sent == [1, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"call": "batch"}', b"\xff\x00"])
def test_a_damaged_record_is_quarantined_and_later_records_are_sent(
    content: bytes, case: Case, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path)
    run_id = case.make_run()
    case.faulty.fault = away
    case.log(run_id, 1.0, 1)
    (first,) = case.outbox.folder.glob("[0-9]*.json")
    case.log(run_id, 2.0, 2)
    first.write_bytes(content)
    again = Tracker(TrackingConfig(tracker.uri), tmp_path)  # a later job on the same storage
    assert len(again.client.outbox) == 0
    assert case.losses(run_id) == [2.0]
    assert (case.outbox.folder / "quarantine" / first.name).read_bytes() == content
    assert "was moved to" in caplog.text


def test_artifacts_whose_copy_is_missing_are_quarantined(case: Case, tmp_path: Path) -> None:
    run_id = case.make_run()
    (tmp_path / "plot.png").write_text("a plot")
    case.faulty.fault = away
    case.outbox.send("artifacts", run_id, path=str(tmp_path / "plot.png"), artifact_path=None)
    case.log(run_id, 0.5)
    shutil.rmtree(case.outbox.folder / "files")
    case.faulty.fault = lambda call, *_: None
    assert case.outbox.flush() == 0
    assert case.losses(run_id) == [0.5]
    assert case.names("quarantine") == ["artifacts"]


def test_a_record_that_always_fails_blocks_only_its_own_run_until_it_is_dropped(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox_module, "TRIES", 3)
    poisoned, healthy = case.make_run(), case.make_run()
    case.faulty.fault = lambda call, *args: (
        coded(INTERNAL_ERROR, RestException) if call == "log_batch" and args[1][0].step == 1 else None
    )
    case.log(poisoned, 1.0, 1)
    case.log(poisoned, 2.0, 2)
    case.log(healthy, 3.0, 3)
    for _ in range(5):
        case.outbox.flush()
    assert case.losses(healthy) == [3.0]
    assert case.losses(poisoned) == []
    assert len(case.outbox) == 2, "it is recent, so the failures may be an outage of the server"
    monkeypatch.setattr(outbox_module, "GIVE_UP_SECONDS", 0.0)
    assert case.outbox.flush() == 0
    assert case.losses(poisoned) == [2.0]
    assert case.names("quarantine") == ["batch"]
    assert "was moved to" in caplog.text


def test_an_unreachable_server_does_not_use_up_the_attempts_of_a_record(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "TRIES", 1)
    monkeypatch.setattr(outbox_module, "GIVE_UP_SECONDS", 0.0)
    run_id = case.make_run()
    case.faulty.fault = away
    case.log(run_id, 0.5)
    for _ in range(3):
        assert case.outbox.flush() == 1
    case.faulty.fault = lambda call, *_: None
    assert case.outbox.flush() == 0
    assert case.losses(run_id) == [0.5]


def test_records_of_a_run_that_cannot_be_created_are_quarantined(case: Case) -> None:
    case.faulty.fault = away
    case.outbox.send("create", f"{LOCAL}1", experiment_id="no such", start_time=0, tags={}, name="one")
    case.log(f"{LOCAL}1", 0.5)
    case.faulty.fault = lambda call, *_: None
    assert case.outbox.flush() == 0
    assert case.names("quarantine") == ["create", "batch"]


def test_damaged_run_ids_do_not_end_a_job(case: Case, tmp_path: Path) -> None:
    case.faulty.fault = away
    case.outbox.send("create", f"{LOCAL}1", experiment_id=case.experiment, start_time=0, tags={}, name="one")
    (case.outbox.folder / "ids.json").write_text("")
    case.faulty.fault = lambda call, *_: None
    assert case.outbox.flush() == 0
    assert not case.outbox.resolve(f"{LOCAL}1").startswith(LOCAL)
