"""What every Ray Train worker does: prepare, train from the last checkpoint, report, evaluate, hand over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from ray_jobs.tracking.system_metrics import system_metrics
from ray_jobs.training.progress import TrainProgress
from ray_jobs.training.worker_errors import in_words, lost_a_peer
from revmux.adapters.folder import save_adapter
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.pretrained.task_model import save_task_model
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import CheckpointConfig, Recipe
from revmux.training.distributed import fail_together, rank_and_world
from revmux.training.recipe import Prepared, prepare
from revmux.training.trainer import load_weights
from revmux.utils.files import atomic_folder
from revmux.utils.out_of_memory import is_out_of_memory

RESULT_NAME = "result"
PEER_SECONDS = 10.0
"""How long a worker that lost a peer keeps still, so that the peer's own failure is seen first."""


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells its workers.

    Attributes:
        recipe: the run.
        task: reference to the data that the driver read.
        title: what is trained, in the words of the progress lines.
        threads: of each worker, its share of the CPUs.
        folder: of the run's checkpoints and its result, on a disk that every worker reaches.
        checkpoint: when the run is saved.
        tracking_uri: MLflow store.
        outbox: folder for what the store cannot take while it is away.
        run_id: the MLflow run that curves go to.
        progress: whether to draw a bar.
        report: takes the figures of each epoch.
    """

    recipe: Recipe
    task: ray.ObjectRef[TaskData]
    title: str
    threads: int
    folder: Path
    checkpoint: CheckpointConfig
    tracking_uri: str = field(repr=False)  # Ray keeps what this shows, and a URI may have a password
    outbox: Path
    run_id: str
    progress: bool
    report: Callable[[dict[str, float]], None]


def train_worker(arguments: dict[str, Any]) -> dict[str, float]:
    """Body of a worker; every rank runs it and reports alike.

    To the end, rank 0 is the one process that writes the run's checkpoints and its result.

    Args:
        arguments: ``{"config": WorkerConfig}``, as Ray Train hands it over.

    Returns:
        The figures of the test split, cost, weights.

    Raises:
        UserError: what a person has to mend, on one worker or on all; :class:`ray_jobs.training.worker_errors.StopOnMistake` ends the
            others.
    """
    try:
        with ExitStack() as until_the_end:
            return train(arguments["config"], until_the_end)
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it shows the stack of what is told in a line
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory ({in_words(error)}); choose a smaller --optim.batch_size, --optim.accumulate 2 or more, or "
                "--optim.gradient_checkpointing true"
            ) from error
        if lost_a_peer(error):
            time.sleep(PEER_SECONDS)
        raise


def train(config: WorkerConfig, until_the_end: ExitStack) -> dict[str, float]:
    """Go on from the last checkpoint to the end, evaluate, and leave the result in the run's folder.

    Args:
        config: from the driver.
        until_the_end: what is held while the worker lives.

    Raises:
        UserError: what a person has to mend.
    """
    torch.set_num_threads(config.threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report otherwise
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it shows the stack of what it raises
    disable_progress_bar()
    task: TaskData = ray.get(config.task)
    first = rank_and_world()[0] == 0
    checkpoints = CheckpointFolder(config.folder, config.checkpoint.keep)
    with fail_together():
        prepared = prepare(config.recipe, task, own_device())
        if first:
            until_the_end.enter_context(checkpoints.locked())
    trainer = prepared.trainer(checkpoints=checkpoints, checkpoint_steps=config.checkpoint.steps)
    start = trainer.resume()
    progress = (
        TrainProgress(config.title, trainer, config.tracking_uri, config.run_id, config.outbox, config.progress)
        if first
        else None
    )
    if progress is not None:
        progress.tell(f"{workers_in_words()}, step {start} of {trainer.total_steps}")
        trainer.on_step = progress.step
    with system_metrics(config.tracking_uri, config.run_id) if first else nullcontext():
        for report in trainer.run():
            if progress is not None:
                progress.epoch(report)
            config.report(report.metrics | {"epoch": report.epoch})
        if progress is not None:
            progress.close()
        load_weights(prepared.model, trainer.best)
        evaluation = prepared.evaluate_test()
    metrics = evaluation.metrics() | {
        "cost_counted": prepared.cost(),
        "tunable_params": float(sum(value.numel() for value in trainer.best.values())),
        "best_epoch": float(trainer.state.best_epoch),
        "selection_accuracy": trainer.state.best_accuracy,
    }
    metrics = {name: value for name, value in metrics.items() if value == value}  # no NaN where there is no teacher
    with fail_together():
        if first:
            leave_result(config.folder / RESULT_NAME, prepared, metrics)
    return metrics


def own_device() -> torch.device:
    """The GPU that Ray gave this process; else the CPU, though torch may see GPUs that are others'."""
    return get_device() if ray.get_gpu_ids() else torch.device("cpu")


def workers_in_words() -> str:
    """How many workers there are, on what, with how many threads each."""
    world, backend = (dist.get_world_size(), f"{dist.get_backend()}, ") if dist.is_initialized() else (1, "")
    threads = torch.get_num_threads()
    return (
        f"{world} worker{'s' * (world > 1)} ({backend}{own_device().type}, {threads} thread{'s' * (threads > 1)} each)"
    )


def leave_result(folder: Path, prepared: Prepared, metrics: dict[str, float]) -> None:
    """:func:`save_result`, whole or not at all.

    Raises:
        UserError: the disk is full or refuses.
    """
    try:
        with atomic_folder(folder) as temporary:
            save_result(temporary, prepared, metrics)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the result to {folder} ({error}); make room there and give the same command again: "
            "training is done and its checkpoint kept"
        ) from error


def save_result(folder: Path, prepared: Prepared, metrics: dict[str, float]) -> None:
    """The finished adapter, or the finished task model in Hugging Face's own form."""
    if prepared.model.method.is_plain:
        save_task_model(prepared.pretrained, folder, prepared.task.is_pair)
    else:
        save_adapter(prepared.model, prepared.adapter_config(metrics), folder)
