"""The jobs that tune a task model and evaluate an adapter, as commands in a process that is connected to a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from serving_models import write_adapter

from ray_jobs import evaluate, finetune
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained

pytestmark = [pytest.mark.cluster("shared"), pytest.mark.usefixtures("ray_here")]


@pytest.fixture
def settings(tiny_csv: Path, tmp_path: Path, mlflow_database: Path) -> list[str]:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    flags = ["--data.source", tiny_csv, "--backbone.max_length", "16", "--storage", tmp_path, "--cluster.workers", "1"]
    return [str(flag) for flag in flags]


def only_run(storage: Path) -> Run:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_finetune_writes_a_task_model_and_records_its_run(
    settings: list[str], tiny_model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backbone.model", str(tiny_model_folder), "--optim.epochs", "1", "--optim.batch_size", "8"]
    assert finetune.command([*settings, *flags]) == 0
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("task-model: epoch 1/1") == 1
    tuned, former = (
        load_pretrained(BackboneConfig(str(folder), max_length=16)).backbone.state_dict()
        for folder in (tmp_path / "task-model", tiny_model_folder)
    )
    assert tuned.keys() == former.keys()
    assert any(not value.equal(former[name]) for name, value in tuned.items())
    run = only_run(tmp_path)
    assert (run.info.run_name, run.info.status) == ("task-model", "FINISHED")
    assert run.data.params["recipe.method.options.tune_backbone"] == "True"


def test_evaluate_writes_figures_and_records_its_run(
    settings: list[str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    pretrained = load_pretrained(BackboneConfig(str(tiny_model_folder), max_length=16))
    adapter = write_adapter(tmp_path, pretrained, 2, method="revmux")
    assert evaluate.command([*settings, "--backbone.model", str(tiny_model_folder), "--adapter", str(adapter)]) == 0
    figures = json.loads((tmp_path / "evaluate-revmux-2.json").read_text())["metrics"]
    assert figures.keys() >= {
        "accuracy_mean",
        "siso_accuracy",
        "siso_agreement",
        "cost_counted",
        "accuracy_mean_served",
    }
    run = only_run(tmp_path)
    assert (run.info.run_name, run.info.status) == ("evaluate-revmux-2", "FINISHED")
    assert run.data.metrics == pytest.approx(figures)
