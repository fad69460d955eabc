"""The progress that a run reports; an unreachable store does not end the run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_jobs.tracking.system_metrics import system_metrics
from ray_jobs.training import progress as train_progress
from ray_jobs.training.progress import TrainProgress
from revmux.training.trainer import EpochReport, TrainerState

METRICS = {"train_loss": 0.5, "selection_accuracy": 0.75}


def trainer(step: int = 0, epochs_done: int = 0) -> Any:
    """A stand-in with the attributes that progress reads: 10 steps in 2 epochs."""
    state = TrainerState(epoch=epochs_done, step=step, history=[METRICS] * epochs_done)
    return SimpleNamespace(state=state, total_steps=10, optim=SimpleNamespace(epochs=2))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(train_progress.time, "perf_counter", lambda: now.seconds)
    return now


@pytest.fixture
def client(mlflow_database: Path, tmp_path: Path) -> tuple[MlflowClient, str, str]:
    """A store with a run: client, URI and run id."""
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}"
    client = MlflowClient(uri)
    return client, uri, client.create_run(client.create_experiment("mine")).info.run_id


def test_rates_count_only_the_steps_of_this_process(
    clock: SimpleNamespace, client: tuple[MlflowClient, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    store, uri, run_id = client
    progress = TrainProgress(
        "adapter", trainer(step=4), uri, run_id, Path(uri[10:]).with_name("outbox"), live=False, interval=1.0
    )
    clock.seconds += 0.5
    progress.step(5, 10, {"loss": torch.tensor(0.25), "tokens": 40})
    assert capsys.readouterr().out == "", "it is not yet time for a line"
    clock.seconds += 0.5
    progress.step(6, 10, {"loss": torch.tensor(0.25), "tokens": 60})
    assert (
        capsys.readouterr().out == "adapter: step 6/10, loss of this step 0.250, 2.0 steps/s, 100 tokens/s, 2 s left\n"
    )
    progress.epoch(EpochReport(1, 6, METRICS, is_best=True, stop=False))
    line = "adapter: epoch 1/2, step 6/10, mean loss of the epoch 0.500, selection accuracy 75.0%, 2.0 steps/s, 100 tokens/s, 2 s left\n"
    assert capsys.readouterr().out == line
    assert [point.value for point in store.get_metric_history(run_id, "live/seconds_left")] == [2.0, 2.0]
    assert store.get_run(run_id).data.metrics["live/tokens_per_second"] == 100


def test_a_resumed_run_records_the_missing_epochs(client: tuple[MlflowClient, str, str]) -> None:
    store, uri, run_id = client
    for _ in range(2):
        TrainProgress(
            "adapter", trainer(step=10, epochs_done=2), uri, run_id, Path(uri[10:]).with_name("outbox"), live=False
        )
    assert [point.step for point in store.get_metric_history(run_id, "train_loss")] == [1, 2]


def test_an_unreachable_store_does_not_end_training(
    clock: SimpleNamespace,
    client: tuple[MlflowClient, str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away(*_: Any) -> None:
        raise MlflowException("connection refused")

    progress = TrainProgress("adapter", trainer(), *client[1:], Path(client[1][10:]).with_name("outbox"), live=False)
    monkeypatch.setattr(train_progress, "log_metrics", away)
    clock.seconds += 1
    with caplog.at_level(logging.WARNING):
        progress.epoch(EpochReport(1, 5, METRICS, is_best=True, stop=False))
    assert "(connection refused); training continues" in caplog.text


def test_system_metrics_are_recorded_even_for_a_short_run(
    client: tuple[MlflowClient, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, uri, run_id = client
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with system_metrics(uri, run_id):
        pass
    assert not store.get_run(run_id).data.metrics
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    with system_metrics(uri, run_id):
        pass
    assert store.get_run(run_id).data.metrics["system/system_memory_usage_megabytes"] > 0
