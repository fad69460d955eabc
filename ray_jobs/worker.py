"""What every Ray Train worker does: prepare, train from the last checkpoint, report, evaluate, hand over."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.experimental import tqdm_ray
from ray.train.torch import get_device
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from ray_jobs.tracking import log_metrics
from revmux.artifact import save_atomically, save_pretrained
from revmux.data import TaskData
from revmux.recipe import Prepared, Recipe, prepare
from revmux.training import EpochReport, Trainer, load_weights

STATE_NAME, BEST_NAME, RESULT_NAME = "trainer.pt", "best.safetensors", "result"


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells its workers.

    Attributes:
        recipe: the run.
        task: reference to the data that the driver read.
        title: what is trained, in the words of the progress lines.
        threads: of each worker; 0 leaves torch's default.
        tracking_uri: MLflow store.
        run_id: the MLflow run that curves go to.
        progress: whether to draw a bar.
    """

    recipe: Recipe
    task: ray.ObjectRef
    title: str
    threads: int
    tracking_uri: str
    run_id: str
    progress: bool


def train_worker(arguments: dict[str, Any]) -> None:
    """Body of a worker; every rank runs it and reports alike.

    Args:
        arguments: ``{"config": WorkerConfig}``, as Ray Train hands it over.
    """
    config: WorkerConfig = arguments["config"]
    if config.threads:
        torch.set_num_threads(config.threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report otherwise
    disable_progress_bar()
    task: TaskData = ray.get(config.task)
    rank = ray.train.get_context().get_world_rank()
    prepared = prepare(config.recipe, task, get_device())
    bar = tqdm_ray.tqdm(desc=config.title, total=0) if config.progress and rank == 0 else None

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        if bar is not None:
            bar.total = total
            bar.update(step - bar._x)

    trainer = prepared.trainer(on_step=on_step)
    best = resume(trainer)
    started = time.perf_counter()
    for report in trainer.run():
        if report.is_best:
            best = trainer.trained_weights()
        if rank == 0:
            # Not print: Ray Train's own print shows each line twice.
            sys.stdout.write(epoch_line(config, trainer, report, time.perf_counter() - started) + "\n")
            sys.stdout.flush()
            log_metrics(config.tracking_uri, config.run_id, report.metrics, report.epoch)
        report_checkpoint(
            report.metrics | {"epoch": report.epoch}, rank, partial(save_state, trainer=trainer, best=best)
        )
    if bar is not None:
        bar.close()
    load_weights(prepared.model, best)
    evaluation = prepared.evaluate_test()
    metrics = evaluation.metrics() | {
        "cost_counted": prepared.cost(),
        "tunable_params": float(sum(value.numel() for value in best.values())),
        "best_epoch": float(trainer.state.best_epoch),
        "selection_accuracy": trainer.state.best_accuracy,
    }
    metrics = {name: value for name, value in metrics.items() if value == value}  # no NaN where there is no teacher
    report_checkpoint(
        metrics | {"epoch": trainer.state.epoch}, rank, partial(save_result, prepared=prepared, metrics=metrics)
    )


def resume(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Go on from the last checkpoint of this run, if there is one; returns the best weights so far."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return trainer.trained_weights()
    with checkpoint.as_directory() as folder:
        if not (Path(folder) / STATE_NAME).is_file():
            return trainer.trained_weights()
        trainer.load_state_dict(torch.load(Path(folder) / STATE_NAME, weights_only=True, map_location="cpu"))
        return load_file(Path(folder) / BEST_NAME)


def save_state(folder: Path, trainer: Trainer, best: dict[str, torch.Tensor]) -> None:
    """What :func:`resume` reads."""
    save_atomically(trainer.state_dict(), folder / STATE_NAME)
    save_file(best, folder / BEST_NAME)


def save_result(folder: Path, prepared: Prepared, metrics: dict[str, float]) -> None:
    """The finished adapter, or the finished task model in Hugging Face's own form."""
    if prepared.model.method.name == "siso":
        prepared.pretrained.backbone.model.save_pretrained(folder / RESULT_NAME)
        prepared.pretrained.tokenizer.save_pretrained(folder / RESULT_NAME)
    else:
        save_pretrained(prepared.model, prepared.adapter_config(metrics), folder / RESULT_NAME)


def report_checkpoint(metrics: dict[str, float], rank: int, write: Callable[[Path], None]) -> None:
    """Report to Ray Train; rank 0 brings the checkpoint, every rank comes."""
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def epoch_line(config: WorkerConfig, trainer: Trainer, report: EpochReport, seconds: float) -> str:
    """One plain line an epoch, for logs."""
    epochs = config.recipe.optim.epochs
    left = seconds / report.step * (trainer.total_steps - report.step) if report.step else 0.0
    metrics = report.metrics
    return (
        f"{config.title}: epoch {report.epoch}/{epochs}, step {report.step}/{trainer.total_steps}, "
        f"loss {metrics['train_loss']:.3f}, selection accuracy {metrics['selection_accuracy']:.1%}, "
        f"{metrics['inputs_per_second']:.0f} inputs/s, {left:.0f} s left"
    )
