"""Loading tasks into a replica: their dtype, their sources, and what the log reports of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_http import listening
from serving_models import load, write_adapter

from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.web import create_app


@pytest.mark.parametrize(("asked", "found"), [(None, "bfloat16"), ("float32", "float32")])
def test_the_model_has_the_dtype_that_its_adapters_were_trained_with(
    serving_tasks: dict[str, Any], tmp_path: Path, asked: str | None, found: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(serving_tasks["topic"]["adapters"][0], folder)
    recorded = json.loads((folder / "adapter_config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "adapter_config.json").write_text(json.dumps(recorded))
    config = AppConfig.model_validate(
        {"model": serving_tasks["topic"]["model"], "adapters": [str(folder)], "dtype": asked}
    )
    service = Service(config)
    expected_warning = pytest.warns(UserWarning, match="was trained on a bfloat16 backbone") if asked else nullcontext()
    try:
        with expected_warning:
            service.serve(config.served)
        assert service.info()["model_dtype"] == found
    finally:
        service.close()


def test_what_mlflow_downloads_is_removed_after_loading(
    serving_tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_client: Any
) -> None:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    downloads = tmp_path / "downloads"
    downloads.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(downloads))
    # As with a remote artifact store: files are downloaded, not read in place.
    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", ArtifactRepository.download_artifacts)
    run = mlflow_client.create_run(
        mlflow_client.create_experiment("toy", artifact_location=str(tmp_path / "artifacts"))
    )
    mlflow_client.log_artifacts(run.info.run_id, serving_tasks["topic"]["adapters"][0], "adapter")
    adapter = f"runs:/{run.info.run_id}/adapter"
    config = AppConfig.model_validate({"model": serving_tasks["topic"]["model"], "adapters": [adapter]})
    service = Service(config)
    try:
        service.serve(config.served)
        assert [item["source"] for item in service.info()["adapters"]] == [adapter]
        assert list(downloads.iterdir()) == []
        both = {
            "mood": {**serving_tasks["topic"], "adapters": [adapter]},
            "missing": {**serving_tasks["topic"], "adapters": ["runs:/1/no"]},
        }
        service.update({"tasks": both})
        assert "runs:/1/no" in str(service.update_error)
        assert list(downloads.iterdir()) == []
    finally:
        service.close()


@pytest.mark.parametrize("kind", ["an error of the registry", "another error"])
def test_info_and_logs_show_no_password_of_the_registry(
    kind: str, serving_tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    registry = "http://me:s3cret@127.0.0.1:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: registry)
    if kind == "another error":

        def fail(*_: object) -> Path:
            raise MemoryError(f"{registry} sent too much")

        monkeypatch.setattr("serve_app.task_loading.fetch_adapter", fail)
    config = AppConfig.model_validate(serving_tasks["topic"])
    service = Service(config)
    try:
        service.update({"tasks": {"topic": {**serving_tasks["topic"], "adapters": ["models:/reviews@champion"]}}})
        with listening(create_app(service)) as url:
            shown = httpx.get(f"{url}/info", timeout=60)
        assert "http://me:***@127.0.0.1:1" in shown.json()["update_error"]
        assert "s3cret" not in shown.text + caplog.text
    finally:
        service.close()


@pytest.mark.parametrize(
    ("accuracy", "threshold", "level", "said"),
    [
        (0.811, None, "WARNING", "accuracy 81.1%, 10.4 points below the plain model (91.5%), more than 2"),
        (0.9, None, "INFO", "accuracy 90.0%, 1.5 points below the plain model (91.5%)"),
        (
            0.811,
            0.9,
            "INFO",
            "10.4 points below the plain model (91.5%), before inputs below confidence 0.9 go on",
        ),
        (None, None, "INFO", "its accuracy was not measured"),
        (float("nan"), None, "INFO", "its accuracy was not measured"),
    ],
)
def test_the_log_reports_the_cost_of_each_adapter_and_warns_above_the_limit(
    serving_tasks: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    accuracy: float | None,
    threshold: float | None,
    level: str,
    said: str,
) -> None:
    folder = tmp_path / "adapter"
    model = Path(serving_tasks["topic"]["model"])
    written = write_adapter(tmp_path, load(model), 2, method="revmux")
    shutil.copytree(written, folder)
    recorded = json.loads((folder / "adapter_config.json").read_text())
    recorded["metrics"] = {} if accuracy is None else {"accuracy_mean": accuracy, "siso_accuracy": 0.915}
    (folder / "adapter_config.json").write_text(json.dumps(recorded))
    config = AppConfig.model_validate({"model": str(model), "adapters": [str(folder)], "threshold": threshold})
    service = Service(config)
    try:
        with caplog.at_level("INFO", "serve_app"):
            service.serve(config.served)
    finally:
        service.close()
    (record,) = [record for record in caplog.records if record.name == "serve_app.measured_loss"]
    assert record.levelname == level
    assert f"adapter {str(folder)!r} (N = 2, revmux): " in record.getMessage()
    assert said in record.getMessage()
    if level == "WARNING":
        assert "Set a threshold for the fallback, or remove this adapter" in record.getMessage()
