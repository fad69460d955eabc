"""From a recipe to a finished folder: one Ray Train run, recorded in MLflow."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster import ClusterConfig
from ray_jobs.tracking.tracker import Tracker
from revmux.data.task import TaskData, load_task
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.methods import BackboneShape, method_class
from revmux.pretrained.identity import identify, identity_of, resolve
from revmux.pretrained.loading import check_answers, outline
from revmux.training.config import CheckpointConfig, MethodConfig, Recipe
from revmux.training.recipe import check, makes_head
from revmux.utils.files import atomic_folder, remove_folder, write_durably

if TYPE_CHECKING:
    from ray_jobs.training.worker import WorkerConfig

RUN_NOTE = "mlflow-run.txt"


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        folder: adapter or task model.
        method: what was trained.
        metrics: the figures of the test split, cost, weights.
        run_id: of the MLflow run.
    """

    folder: Path
    method: MethodConfig
    metrics: dict[str, float]
    run_id: str


def load_checked(recipe: Recipe, workers: int) -> TaskData:
    """Check a recipe against the backbone's shape, then read its data: all that can fail before a cluster starts."""
    if not makes_head(recipe):
        check_answers(recipe.backbone)
    backbone, own_labels = outline(recipe.backbone)
    check(recipe, BackboneShape.of(backbone), workers, backbone.max_length)
    return load_task(recipe.data, own_labels)


@dataclass(frozen=True)
class TrialHooks:
    """How the trial of a sweep takes part in its run; the defaults are those of a run that is no trial.

    Attributes:
        report: takes the metrics of each epoch. Where it is given, the run has one worker, which is this very process
            (Ray Train's local mode), and the caller retries what fails.
        callbacks: of Ray Train.
        stopping: whether this process is being stopped, and its workers before it.
    """

    report: Callable[[dict[str, float]], None] | None = None
    callbacks: Sequence[Any] = ()
    stopping: Callable[[], bool] = lambda: False


def launch(
    recipe: Recipe,
    task: TaskData,
    cluster: ClusterConfig,
    tracker: Tracker,
    storage: Path,
    name: str,
    output: Path,
    parent: str | None = None,
    checkpoint: CheckpointConfig | None = None,
    hooks: TrialHooks | None = None,
) -> Trained:
    """Train on the connected cluster; a run that was stopped goes on from its last checkpoint.

    Args:
        recipe: checked already.
        task: its data.
        cluster: workers and their resources; connected already.
        tracker: where the run is recorded.
        storage: absolute folder for checkpoints, on a disk that every worker reaches.
        name: of the run; the same name with the same recipe resumes.
        output: folder that the result takes.
        parent: MLflow run id of a sweep.
        checkpoint: when the run is saved; by default at the end of each epoch.
        hooks: of a trial.

    Raises:
        UserError: something that the user has to fix, such as a full disk; the checkpoints stay.
        WorkerError: a worker failed more often than ``cluster.max_failures``.
        SystemExit: it failed because it is being stopped.
    """
    import ray
    import ray.train

    from ray_jobs.training.worker import RESULT_NAME, WorkerConfig

    hooks = hooks or TrialHooks()
    run_folder = storage / "checkpoints" / f"{name}-{fingerprint(recipe, task)}"
    note = run_folder / RUN_NOTE
    with tracker.run(name, run_params(recipe, cluster), parent, begun_run(note, tracker)) as run_id:
        write_note(note, run_id)
        tracker.log_data(run_id, task.identity)
        # The plots of a comparison begin with a run's first figure, which would be the machine's load.
        tracker.log_metrics(run_id, {"accuracy_mean": math.nan})
        worker = WorkerConfig(
            recipe=recipe,
            task=ray.put(task),
            title=name,
            threads=max(1, int(cluster.cpus_per_worker)),
            folder=run_folder,
            checkpoint=checkpoint or CheckpointConfig(),
            tracking_uri=tracker.uri,
            outbox=tracker.outbox,
            run_id=run_id,
            progress=sys.stderr.isatty(),
            report=hooks.report or ray.train.report,
        )
        metrics = fit(worker, cluster, hooks)
        with atomic_folder(output) as temporary:
            shutil.copytree(run_folder / RESULT_NAME, temporary, dirs_exist_ok=True)
        record_result(tracker, run_id, recipe, metrics, output)
        remove_folder(run_folder)
    return Trained(output, recipe.method, metrics, run_id)


def fit(worker: WorkerConfig, cluster: ClusterConfig, hooks: TrialHooks) -> dict[str, float]:
    """Run the workers by Ray Train until they end.

    Args:
        worker: what each of them does.
        cluster: their number and resources.
        hooks: of a trial.

    Returns:
        What the workers return.

    Raises:
        UserError: see :func:`launch`.
        WorkerError: see there.
        SystemExit: see there.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from ray_jobs.training.waiting import Waiting, start_timeout
    from ray_jobs.training.worker import train_worker
    from ray_jobs.training.worker_errors import StopOnMistake, as_told

    # Ray Train's own print shows lines twice, and hides the bar.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    logging.getLogger("ray.train.v2.api.config").setLevel(logging.WARNING)  # else each local run is announced
    waiting = Waiting(worker.title, cluster.wait_minutes)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": worker},
        scaling_config=ScalingConfig(
            num_workers=0 if hooks.report else cluster.workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=cluster.worker_resources,
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=RunConfig(
            name=worker.folder.name,
            storage_path=str(worker.folder.parent),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[*hooks.callbacks, StopOnMistake(worker.title), waiting],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with start_timeout(waiting.patience.interval):
            metrics: dict[str, float] = trainer.fit().return_value
    except Exception as error:
        if hooks.stopping():
            raise SystemExit(0) from error
        if isinstance(error, TrainingFailedError):
            raise as_told(error) from error
        raise
    return metrics


def begun_run(note: Path, tracker: Tracker) -> str | None:
    """The MLflow run that an earlier start of the same run noted, where MLflow still has it."""
    begun = note.read_text().strip() if note.is_file() else None
    return begun if tracker.has_run(begun) else None


def record_result(tracker: Tracker, run_id: str, recipe: Recipe, metrics: dict[str, float], output: Path) -> None:
    """The final metrics and the finished folder in MLflow."""
    best = metrics.get("selection_accuracy", math.nan)  # a point of this name would be on the curve of the epochs
    final = {name: value for name, value in metrics.items() if name != "selection_accuracy"}
    tracker.log_metrics(run_id, final | {"best_selection_accuracy": best})
    tracker.log_folder(run_id, output, "task-model" if method_class(recipe.method.name).is_plain else "adapter")


def write_note(note: Path, run_id: str) -> None:
    """Note the MLflow run beside the checkpoints, so that both go on together.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        write_durably(note, run_id + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {note.parent} ({error.strerror or error}); make room there, or name another storage folder"
        ) from error


def run_params(recipe: Recipe, cluster: ClusterConfig) -> dict[str, Any]:
    """What MLflow shows of a run, the same keys for every run; the three knobs come first, where its plots begin."""
    return {
        "infonce_weight": recipe.loss.infonce_weight,
        "num_inputs": recipe.method.num_inputs,
        "prefill_layers": recipe.method.prefill_layers,
        "recipe": recipe,
        "task_model": identity_of(recipe.backbone),
        "worker_gpus": cluster.gpus_per_worker,
        "workers": cluster.workers,
    }


def fingerprint(recipe: Recipe, task: TaskData) -> str:
    """Eight characters that change with anything that decides the weights: only the same run is resumed.

    Other weights under the backbone's name make another run; another place of the store, or more shuffles, do not.
    """
    backbone = recipe.backbone
    model = identify(backbone.model, resolve(backbone.model), backbone.revision)
    weights = model["revision"] or model["sha256"]  # a commit is known before the weights are here
    decides = replace(recipe, store=StoreConfig(root="any", copies="any", dtype=recipe.store.dtype), shuffles=1)
    return hashlib.sha256(f"{decides!r}{weights}{task.identity['sha256']}".encode()).hexdigest()[:8]
