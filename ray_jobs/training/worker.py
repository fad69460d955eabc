"""The Ray Train worker: prepare, train from the last checkpoint, report, evaluate, and save the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from ray_jobs.tracking.system_metrics import system_metrics
from ray_jobs.training.progress import TrainProgress
from ray_jobs.training.worker_errors import describe_error, lost_a_peer
from revmux.adapters.folder import save_adapter
from revmux.errors import UserError
from revmux.features.tokens import TokenizedTask
from revmux.pretrained.task_model import save_task_model
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import CheckpointConfig, Recipe
from revmux.training.distributed import fail_together, rank_and_world
from revmux.training.recipe import Prepared, prepare
from revmux.training.trainer import load_weights
from revmux.utils.copies import join_location
from revmux.utils.out_of_memory import is_out_of_memory
from revmux.utils.redact import without_passwords
from revmux.utils.stored_folder import writing_folder

RESULT_NAME = "result"
PEER_SECONDS = 10.0
"""Seconds that a worker waits after losing a peer, so that Ray Train sees the peer's own failure first."""


@dataclass(frozen=True)
class WorkerConfig:
    """Settings that the driver passes to its workers.

    Attributes:
        recipe: the run.
        task: location of the tokens that the driver stored.
        title: name of the run in printed lines.
        threads: CPU threads per worker.
        folder: folder or URI for the run's checkpoints and result, which every worker reaches.
        checkpoint: when to save checkpoints.
        tracking_uri: MLflow store.
        outbox: folder or URI for records while MLflow cannot be reached.
        run_id: the MLflow run to log to.
        progress: whether to draw a bar.
        report: called with the metrics of each epoch.
        keep_backbone: whether to keep the frozen backbone in memory for the next run of this process.
    """

    recipe: Recipe
    task: TokenizedTask
    title: str
    threads: int
    folder: str
    checkpoint: CheckpointConfig
    tracking_uri: str = field(repr=False)  # it may contain a password
    outbox: str
    run_id: str
    progress: bool
    report: Callable[[dict[str, float]], None]
    keep_backbone: bool = False


def train_worker(config: WorkerConfig) -> dict[str, float]:
    """Body of a worker. Every rank runs it and reports the same metrics.

    Only rank 0 writes the run's checkpoints and its result.

    Args:
        config: settings from the driver.

    Returns:
        Figures on the test split, cost, and number of tunable weights.

    Raises:
        UserError: the user has to fix something, on one worker or on all;
            :class:`ray_jobs.training.worker_errors.RestartPolicy` ends the others.
    """
    try:
        with ExitStack() as worker_stack:
            return train(config, worker_stack)
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            logging.getLogger("ray.train").setLevel(
                logging.CRITICAL
            )  # it would print a traceback for an error that is printed on one line
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory ({describe_error(error)}); choose a smaller --optim.batch_size, --optim.accumulate 2 or more, or "
                "--optim.gradient_checkpointing true"
            ) from error
        if lost_a_peer(error):
            time.sleep(PEER_SECONDS)
        raise


def train(config: WorkerConfig, worker_stack: ExitStack) -> dict[str, float]:
    """Train from the last checkpoint to the end, evaluate, and write the result to the run's folder.

    Args:
        config: settings from the driver.
        worker_stack: contexts that stay open until the worker ends.

    Raises:
        UserError: the user has to fix something.
    """
    torch.set_num_threads(config.threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train would log every report
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints a traceback for what it raises
    disable_progress_bar()
    first = rank_and_world()[0] == 0
    checkpoints = CheckpointFolder(config.folder, config.checkpoint.keep)
    with fail_together():
        # With several workers, the driver has filled and verified the stores.
        verify = False if rank_and_world()[1] > 1 else None
        prepared = prepare(config.recipe, config.task, assigned_device(), verify, config.keep_backbone)
        if first:
            worker_stack.enter_context(checkpoints.locked())
    trainer = prepared.trainer(checkpoints=checkpoints, checkpoint_steps=config.checkpoint.steps)
    start = trainer.resume()
    progress = (
        TrainProgress(config.title, trainer, config.tracking_uri, config.run_id, config.outbox, config.progress)
        if first
        else None
    )
    if progress is not None:
        progress.print_line(f"{describe_workers()}, step {start} of {trainer.total_steps}")
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
        "selection_siso_accuracy": trainer.state.history[-1].get("selection_siso_accuracy", math.nan),
    }
    metrics = {
        name: value for name, value in metrics.items() if value == value
    }  # figures against a teacher are NaN if there is none
    with fail_together():
        if first:
            write_result(join_location(config.folder, RESULT_NAME), prepared, metrics)
    return metrics


def assigned_device() -> torch.device:
    """The GPU that Ray assigned to this process; otherwise the CPU, even if torch sees GPUs of other processes."""
    return get_device() if ray.get_gpu_ids() else torch.device("cpu")


def describe_workers() -> str:
    """The number of workers, their backend and device, and the threads per worker, as text."""
    world, backend = (dist.get_world_size(), f"{dist.get_backend()}, ") if dist.is_initialized() else (1, "")
    threads = torch.get_num_threads()
    return f"{world} worker{'s' * (world > 1)} ({backend}{assigned_device().type}, {threads} thread{'s' * (threads > 1)} each)"


def write_result(location: str, prepared: Prepared, metrics: dict[str, float]) -> None:
    """Call :func:`save_result` for a folder or URI, which is complete afterwards or unchanged.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        with writing_folder(location) as temporary:
            save_result(temporary, prepared, metrics)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the result to {without_passwords(location)} ({error}); free some space there and run the same command again: "
            "training is complete and its checkpoint is kept"
        ) from error


def save_result(folder: Path, prepared: Prepared, metrics: dict[str, float]) -> None:
    """Save the trained adapter, or the trained task model in Hugging Face's format."""
    if prepared.model.method.is_plain:
        save_task_model(prepared.pretrained, folder, prepared.task.is_pair)
    else:
        save_adapter(prepared.model, prepared.adapter_config(metrics), folder)
