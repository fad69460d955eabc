"""Adapters and task models of the server from MLflow, by run and by alias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import load, plain_scores

from revmux.errors import UserError
from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.sources import fetch_adapter, fetch_model


def test_adapters_come_from_mlflow_by_run_and_by_alias(
    serving_adapters: list[Path], tmp_path: Path, mlflow_client: Any
) -> None:
    run = mlflow_client.create_run(
        mlflow_client.create_experiment("toy", artifact_location=str(tmp_path / "artifacts"))
    )
    mlflow_client.log_artifacts(run.info.run_id, str(serving_adapters[0]), "adapter")
    mlflow_client.create_registered_model("toy")
    version = mlflow_client.create_model_version("toy", f"{run.info.artifact_uri}/adapter", run.info.run_id)
    mlflow_client.set_registered_model_alias("toy", "champion", version.version)
    weights = (serving_adapters[0] / "adapter_model.safetensors").read_bytes()
    for uri in (f"runs:/{run.info.run_id}/adapter", "models:/toy@champion"):
        assert (fetch_adapter(uri, tmp_path) / "adapter_model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="models:/toy@nobody"):
        fetch_adapter("models:/toy@nobody", tmp_path)


def test_task_models_come_from_mlflow_by_run_and_by_alias(
    serving_model: Path, serving_adapters: list[Path], tmp_path: Path, mlflow_client: Any
) -> None:
    run = mlflow_client.create_run(
        mlflow_client.create_experiment("toy", artifact_location=str(tmp_path / "artifacts"))
    ).info
    mlflow_client.log_artifacts(run.run_id, str(serving_model), "model")
    mlflow_client.log_artifacts(run.run_id, str(serving_adapters[0]), "adapter")
    mlflow_client.create_registered_model("moods")
    version = mlflow_client.create_model_version("moods", f"{run.artifact_uri}/model", run.run_id).version
    mlflow_client.set_registered_model_alias("moods", "champion", version)
    config = AppConfig.model_validate(
        {
            "tasks": {
                "alias": {"model": "models:/moods@champion", "adapters": [f"runs:/{run.run_id}/adapter"]},
                "run": {"model": f"runs:/{run.run_id}/model"},
            }
        }
    )
    service = Service(config)
    service.serve(config.served)
    for name, task in service.engine.tasks.items():
        assert service.info()["tasks"][name]["model_id"] == config.served[name].model
        answer = service.engine.submit(["w1 w2"], task=task, max_multiplex=1)[0].result(60)
        assert torch.equal(answer.scores, plain_scores(load(serving_model), ["w1 w2"])[0])
    service.close()
    for wrong, message in (
        ("models:/moods@nobody", "cannot download 'models:/moods@nobody' from MLflow"),
        (f"runs:/{run.run_id}/adapter", "contains 0 task models"),
    ):
        with pytest.raises(UserError, match=message):
            fetch_model(wrong, tmp_path)
