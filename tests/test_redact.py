"""Passwords in tracking URIs appear in no message, log, page or record."""

from __future__ import annotations

import logging
import re
import shutil
import socket
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_models import load, write_adapter, write_model

from ray_jobs import cli
from ray_jobs.sweep.trials import reason_of
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.outbox import BufferedClient
from ray_jobs.tracking.system_metrics import system_metrics
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.progress import TrainProgress
from ray_jobs.training.worker import WorkerConfig
from ray_jobs.training.worker_errors import describe_error
from revmux import UserError
from revmux.training.trainer import TrainerState
from revmux.utils.redact import error_line, redact_logs, without_passwords
from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.sources import fetch_adapter

SECRET = "s3cret"


@pytest.fixture(params=["http", "postgresql+psycopg2"])
def uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An unreachable server whose URI has a password."""
    if request.param != "http":
        pytest.importorskip(
            "psycopg2", reason="the PostgreSQL driver is not installed; run: pip install 'revmux[postgres]'"
        )
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"{request.param}://me:{SECRET}@127.0.0.1:{probe.getsockname()[1]}/runs"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql+psycopg2://me:pa/s@s@host/db", "postgresql+psycopg2://me:***@host/db"),
        ("postgresql://host/db?user=me&password=secret&ssl=on", "postgresql://host/db?user=me&password=***&ssl=on"),
        ("'mysql://me:p%40ss@host:3306/db'", "'mysql://me:***@host:3306/db'"),
        ("redis://:secret@host", "redis://:***@host"),
        ("https://store/x?sig=abc%2F&se=2030", "https://store/x?sig=***&se=2030"),
        (
            "https://s3/x?X-Amz-Security-Token=abc&X-Amz-Signature=def",
            "https://s3/x?X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        ("from http://me:one@a to http://me:two@b", "from http://me:***@a to http://me:***@b"),
        ("two\nlines http://me:one@a\nend", "two\nlines http://me:***@a\nend"),
    ],
)
def test_passwords_are_removed_from_a_whole_message(text: str, clean: str) -> None:
    assert without_passwords(f"cannot open {text} (refused)") == f"cannot open {clean} (refused)"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////mnt/runs/mlflow.db",
        "http://127.0.0.1:5000",
        "postgresql://me@db:5432/a",
        "models:/reviews@champion",
        "cannot download 'models:/reviews@champion' from MLflow at http://db:5000",
        "batch_size=4, tokens=128",
    ],
)
def test_a_text_without_a_password_is_unchanged(text: str) -> None:
    assert without_passwords(text) == text


def test_an_error_is_one_line_even_without_a_message() -> None:
    assert error_line(ValueError("no http://me:one@a\nmore")) == "no http://me:***@a"
    assert error_line(ConnectionResetError()) == "ConnectionResetError"


def clean(caplog: pytest.LogCaptureFixture, words: str) -> None:
    assert re.search(words, caplog.text)
    assert SECRET not in caplog.text


def test_a_tracker_that_cannot_open_its_store_shows_no_password(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot open the MLflow store '.*://me:\*\*\*@127") as raised:
        Tracker(TrackingConfig(uri), tmp_path)
    assert SECRET not in str(raised.value)


def lose_connection(client: Any, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls fail as with a store that was reachable before; a database is opened by the client."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"cannot reach {uri}")

    for name in ("log_batch", "get_metric_history", "search_experiments"):
        monkeypatch.setattr(client, name, fail)


def test_an_outbox_with_an_unreachable_server_shows_no_password(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = BufferedClient("http://127.0.0.1:1", tmp_path / "outbox")
    lose_connection(client.plain, uri, monkeypatch)
    client.log_batch("0" * 32)
    clean(caplog, r"cannot reach MLflow .*me:\*\*\*@")


def test_an_outbox_that_drops_a_record_shows_no_password(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = BufferedClient("http://127.0.0.1:1", tmp_path / "outbox")
    lose_connection(client.plain, uri, monkeypatch)
    client.log_batch("0" * 32)

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError(f"not for {uri}")

    monkeypatch.setattr(client.plain, "log_batch", fail)
    assert client.outbox.flush() == 0
    clean(caplog, r"cannot be sent to MLflow \(not for .*me:\*\*\*@")


def test_progress_with_an_unreachable_server_shows_no_password(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not uri.startswith("http"):
        pytest.skip("a database is opened before training starts")
    state = TrainerState(epoch=1, step=2, history=[{"train_loss": 0.5}])
    trainer: Any = SimpleNamespace(state=state, total_steps=10, optim=SimpleNamespace(epochs=2))
    TrainProgress("one", trainer, uri, "0" * 32, tmp_path / "outbox", live=False)
    clean(caplog, r"cannot log metrics to MLflow at http://me:\*\*\*@")


def test_system_metrics_with_an_unreachable_server_show_no_password(
    uri: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("psutil")
    with system_metrics(uri, "0" * 32):
        pass
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


def test_logs_of_mlflow_show_no_password(capfd: pytest.CaptureFixture[str]) -> None:
    redact_logs("mlflow")
    log = logging.getLogger("mlflow.some.module")
    log.warning("Failed to get %s: %s.", "a run", "http://me:s3cret@host")
    try:
        raise ConnectionError("http://me:s3cret@host is away")
    except ConnectionError:
        log.exception("oops")
    log.warning("too few arguments: %s %s", "http://me:s3cret@host")  # logging itself only reports this
    shown = capfd.readouterr().err
    assert shown.count("me:***@host") >= 3
    assert SECRET not in shown


def test_the_parameters_of_a_run_show_no_password(mlflow_database: Path, tmp_path: Path) -> None:
    shutil.copy(mlflow_database, tmp_path)
    tracker = Tracker(TrackingConfig(), tmp_path)
    with tracker.run("one", {"data": {"source": f"s3://me:{SECRET}@bucket/reviews"}}) as run_id:
        assert tracker.client.get_run(run_id).data.params == {"data.source": "s3://me:***@bucket/reviews"}


def test_a_served_adapter_whose_uri_has_a_password_shows_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path)
    folder = write_adapter(tmp_path, load(model), 2)
    uri = f"s3://me:{SECRET}@bucket/adapter"
    monkeypatch.setattr("serve_app.task_loading.fetch_adapter", lambda adapter, downloads: folder)
    caplog.set_level(logging.INFO, "serve_app")
    service = Service(AppConfig(model=str(model), adapters=[uri]))
    service.serve(service.config.served)
    (shown,) = service.info()["adapters"]
    assert shown["source"] == "s3://me:***@bucket/adapter"
    monkeypatch.setattr("serve_app.task_loading.fetch_adapter", fetch_adapter)
    service.update({"tasks": {"default": {"model": str(model), "adapters": [f"hdfs://me:{SECRET}@host/adapter"]}}})
    assert "hdfs://me:***@host/adapter" in service.info()["update_error"]
    service.close()
    clean(caplog, r"s3://me:\*\*\*@bucket")


def test_settings_on_the_ray_dashboard_show_no_password(uri: str) -> None:
    shown = {item.name: item.repr for item in fields(WorkerConfig)}
    assert [name for name, is_shown in shown.items() if not is_shown] == ["tracking_uri"]
    assert SECRET not in f"{TrackingConfig(uri)}"


def test_reasons_of_failures_show_no_password(uri: str) -> None:
    assert SECRET not in reason_of(f"Traceback\nmlflow.exceptions.MlflowException: {uri} is away")
    assert SECRET not in describe_error(RuntimeError(f"{uri} is away"))


@pytest.mark.parametrize(("error", "status"), [(UserError, 2), (ConnectionError, 1)])
def test_the_error_that_ends_a_job_shows_no_password(
    error: type[Exception], status: int, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise error(f"{uri} is away")

    assert cli.run(fail, TrackingConfig, None, []) == status
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) is (status == 1)
    assert "me:***@" in shown
    assert SECRET not in shown


def test_a_server_that_cannot_fetch_its_adapter_shows_no_password(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: uri)
    with pytest.raises(
        UserError, match=r"cannot download 'models:/reviews@champion' from MLflow at .*://me:\*\*\*@127.*"
    ) as raised:
        fetch_adapter("models:/reviews@champion", tmp_path)
    assert SECRET not in str(raised.value)
