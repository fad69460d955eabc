"""Train one recipe with Ray Train, record the run in MLflow, and write the finished folder."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster import POLLING, ClusterConfig
from ray_jobs.ray_internals import controllers_know_their_cluster
from ray_jobs.tracking.tracker import Tracker
from revmux.data.task import TaskData, load_task
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.features.tokens import TokenizedTask
from revmux.methods import BackboneShape, method_class
from revmux.pretrained.identity import identify, identity_of, resolve
from revmux.pretrained.loading import check_answers, outline
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import CheckpointConfig, MethodConfig, Recipe
from revmux.training.recipe import check, check_rows, makes_head
from revmux.utils.copies import join_location
from revmux.utils.place import Place
from revmux.utils.redact import error_line
from revmux.utils.stored_folder import publish_folder, reading_folder

if TYPE_CHECKING:
    from ray_jobs.training.worker import WorkerConfig

RUN_ID_FILE, FINISHED_FILE = "mlflow-run.txt", "finished.json"


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        folder: folder or URI of the adapter or task model.
        method: the method that was trained.
        metrics: figures on the test split, cost, and number of tunable weights.
        run_id: id of the MLflow run.
        run_folder: folder or URI of the run's checkpoints, which :meth:`forget` removes.
    """

    folder: str
    method: MethodConfig
    metrics: dict[str, float]
    run_id: str
    run_folder: str

    def forget(self) -> None:
        """Remove the run's checkpoints, so that the same run starts from the beginning next time."""
        CheckpointFolder(self.run_folder).remove()

    def keep(self, recipe: Recipe, registered: str | None) -> None:
        """Note beside the checkpoints that the run is finished, see :func:`finished_run`.

        Args:
            recipe: what was trained.
            registered: name of the registered model that the adapter is a version of, if any.
        """
        noted = {"metrics": self.metrics, "run_id": self.run_id, "shuffles": recipe.shuffles, "registered": registered}
        Place.open(self.run_folder).put(FINISHED_FILE, json.dumps(noted).encode())


def finished_run(
    recipe: Recipe, task: TokenizedTask, tracker: Tracker, storage: str, name: str, output: str
) -> tuple[Trained, str | None] | None:
    """A run that an earlier start of its job finished, and the name under which it was registered.

    Its result is written to ``output`` again, where another job may have written its own meanwhile. None if the run is not
    finished or was evaluated in another way. For the arguments, see :func:`launch`.
    """
    from ray_jobs.training.worker import RESULT_NAME

    folder = run_folder_of(recipe, task, storage, name)
    try:
        noted = json.loads(Place.open(folder).get(FINISHED_FILE))
    except (FileNotFoundError, ValueError):  # not finished, or killed while it was noted
        return None
    if noted["shuffles"] != recipe.shuffles or not tracker.has_run(noted["run_id"]):
        return None
    with reading_folder(join_location(folder, RESULT_NAME)) as result:
        publish_folder(result, output)
    return Trained(output, recipe.method, noted["metrics"], noted["run_id"], folder), noted["registered"]


def run_folder_of(recipe: Recipe, task: TokenizedTask, storage: str, name: str) -> str:
    """The folder or URI of a run's checkpoints."""
    return join_location(storage, f"checkpoints/{name}-{fingerprint(recipe, task)}")


def load_checked(recipes: Sequence[Recipe], workers: int) -> TaskData:
    """Check recipes against the backbone's shape and read their data, so that mistakes show before a cluster starts.

    Args:
        recipes: runs on the same backbone and data.
        workers: number of workers that share a step.
    """
    first = recipes[0]
    if not makes_head(first):
        check_answers(first.backbone)
    backbone, own_labels = outline(first.backbone)
    for recipe in recipes:
        check(recipe, BackboneShape.of(backbone), workers, backbone.max_length)
    task = load_task(first.data, own_labels)
    check_rows(recipes, len(task.train))
    return task


@dataclass(frozen=True)
class TrialHooks:
    """Hooks through which a sweep's trial controls its run. The defaults are for a run outside a sweep.

    Attributes:
        report: called with the metrics of each epoch. If it is given, this process is the only worker (Ray Train's
            local mode), it may run other trials later, and the caller retries failures.
        callbacks: callbacks for Ray Train.
        stopping: returns whether Ray Tune is stopping this process, which stops its workers first.
        earlier_run: id of the trial's MLflow run in an earlier start, in case its checkpoints are gone.
    """

    report: Callable[[dict[str, float]], None] | None = None
    callbacks: Sequence[Any] = ()
    stopping: Callable[[], bool] = lambda: False
    earlier_run: str | None = None


def launch(
    recipe: Recipe,
    task: TokenizedTask,
    cluster: ClusterConfig,
    tracker: Tracker,
    storage: str | Path,
    name: str,
    output: str | Path,
    parent: str | None = None,
    checkpoint: CheckpointConfig | None = None,
    hooks: TrialHooks | None = None,
) -> Trained:
    """Train on the connected cluster; a run that was stopped resumes from its last checkpoint.

    The checkpoints stay until the caller calls :meth:`Trained.forget`.

    Args:
        recipe: already checked.
        task: its tokens.
        cluster: workers and their resources; already connected.
        tracker: records the run.
        storage: absolute folder or URI for checkpoints, which every worker reaches.
        name: name of the run; the same name with the same recipe resumes.
        output: folder or URI to write the result to.
        parent: MLflow run id of the sweep that the run belongs to.
        checkpoint: when to save checkpoints; by default at the end of each epoch.
        hooks: hooks of a sweep's trial.

    Raises:
        UserError: the user has to fix something, such as a full disk; the checkpoints are kept.
        WorkerError: a worker failed more often than ``cluster.max_failures``.
        SystemExit: the run failed because Ray Tune is stopping it.
    """
    import ray.train

    from ray_jobs.training.worker import RESULT_NAME, WorkerConfig

    hooks = hooks or TrialHooks()
    output = str(output)
    run_folder = run_folder_of(recipe, task, str(storage), name)
    place = Place.open(run_folder)
    former_run = previous_run_id(place, tracker) or hooks.earlier_run
    with tracker.run(name, run_params(recipe, cluster), parent, former_run) as run_id:
        write_run_id(place, run_id)
        tracker.log_data(run_id, task.identity)
        # MLflow's comparison plots start with the first metric logged, which would otherwise be the machine's load.
        tracker.log_metrics(run_id, {"accuracy_mean": math.nan})
        worker = WorkerConfig(
            recipe=recipe,
            task=task,
            title=name,
            threads=max(1, int(cluster.cpus_per_worker)),
            folder=run_folder,
            checkpoint=checkpoint or CheckpointConfig(),
            tracking_uri=tracker.uri,
            outbox=tracker.outbox,
            run_id=run_id,
            progress=sys.stderr.isatty(),
            report=hooks.report or ray.train.report,
            keep_backbone=hooks.report is not None,
        )
        metrics = fit(worker, cluster, hooks)
        with reading_folder(join_location(run_folder, RESULT_NAME)) as result:
            publish_folder(result, output)
            record_result(tracker, run_id, recipe, metrics, result)
    return Trained(output, recipe.method, metrics, run_id, run_folder)


def fit(worker: WorkerConfig, cluster: ClusterConfig, hooks: TrialHooks) -> dict[str, float]:
    """Run the workers with Ray Train until they finish.

    Args:
        worker: settings of each worker.
        cluster: number of workers and resources per worker.
        hooks: hooks of a sweep's trial.

    Returns:
        The metrics that the workers return.

    Raises:
        UserError: see :func:`launch`.
        WorkerError: see :func:`launch`.
        SystemExit: see :func:`launch`.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from ray_jobs.training.resource_wait import WorkerWait, start_timeout
    from ray_jobs.training.worker import train_worker
    from ray_jobs.training.worker_errors import RestartPolicy, error_to_raise

    # Ray Train's patch of print() shows lines twice and hides the progress bar.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault(POLLING, "0.5")  # on a cluster of several machines; passed on to Ray Train's controller
    logging.getLogger("ray.train.v2.api.config").setLevel(logging.WARNING)  # it announces each local run
    place = Place.open(worker.folder)
    storage_path, _, run_name = place.path.rpartition("/")
    waiting = WorkerWait(worker.title, cluster.wait_minutes)
    trainer = TorchTrainer(
        # Not as train_loop_config, which Ray Train shows, and whose modules its controller would import before it starts
        # the workers.
        partial(train_worker, worker),
        scaling_config=ScalingConfig(
            num_workers=0 if hooks.report else number_of_workers(cluster),
            elastic_resize_monitor_interval_s=60 * cluster.resize_minutes,
            use_gpu=cluster.use_gpu,
            resources_per_worker=cluster.worker_resources,
            accelerator_type=cluster.accelerator_type,
            label_selector=cluster.labels,
        ),
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo", timeout_s=round(60 * cluster.collective_minutes)
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=storage_path,
            storage_filesystem=None if place.local else place.filesystem,
            failure_config=FailureConfig(max_failures=-1),  # RestartPolicy counts
            callbacks=[*hooks.callbacks, RestartPolicy(worker.title, cluster.max_failures), waiting],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    known = nullcontext() if hooks.report else controllers_know_their_cluster()
    try:
        with start_timeout(waiting.resource_wait.interval), known:
            metrics: dict[str, float] = trainer.fit().return_value
    except Exception as error:
        if hooks.stopping():
            raise SystemExit(0) from error
        if isinstance(error, TrainingFailedError):
            raise error_to_raise(error) from error
        raise
    return metrics


def number_of_workers(cluster: ClusterConfig) -> int | tuple[int, int]:
    """The number of workers for Ray Train; the smallest and the largest if it may change."""
    return cluster.workers if cluster.min_workers in (None, cluster.workers) else (cluster.min_workers, cluster.workers)


def previous_run_id(folder: Place, tracker: Tracker) -> str | None:
    """The MLflow run id that an earlier start of this run wrote; None if there is none or MLflow no longer has it."""
    run_id = read_run_id(folder)
    return run_id if tracker.has_run(run_id) else None


def read_run_id(folder: Place) -> str | None:
    """The MLflow run id that :func:`write_run_id` wrote; None if there is none."""
    try:
        return folder.get(RUN_ID_FILE).decode().strip() or None
    except FileNotFoundError:
        return None


def record_result(tracker: Tracker, run_id: str, recipe: Recipe, metrics: dict[str, float], result: Path) -> None:
    """Log the final metrics and the finished folder to MLflow."""
    best = metrics.get(
        "selection_accuracy", math.nan
    )  # under its own name it would add a point to the curve of the epochs
    final = {name: value for name, value in metrics.items() if name != "selection_accuracy"}
    tracker.log_metrics(run_id, final | {"best_selection_accuracy": best})
    tracker.log_folder(run_id, result, "task-model" if method_class(recipe.method.name).is_plain else "adapter")


def write_run_id(folder: Place, run_id: str) -> None:
    """Write the MLflow run id beside the checkpoints, so that a resumed run continues in the same MLflow run.

    Raises:
        UserError: the folder cannot be created or written.
    """
    try:
        folder.filesystem.create_dir(folder.path, recursive=True)
        folder.put(RUN_ID_FILE, f"{run_id}\n".encode())
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.path} ({error_line(error)}); free some space there or choose another --storage"
        ) from error


def run_params(recipe: Recipe, cluster: ClusterConfig) -> dict[str, Any]:
    """A run's parameters in MLflow, with the same keys for every run. MLflow's plots start with the first three."""
    return {
        "infonce_weight": recipe.loss.infonce_weight,
        "num_inputs": recipe.method.num_inputs,
        "prefill_layers": recipe.method.prefill_layers,
        "recipe": recipe,
        "task_model": identity_of(recipe.backbone),
        "worker_gpus": cluster.gpus_per_worker,
        "workers": cluster.workers,
    }


def fingerprint(recipe: Recipe, task: TaskData | TokenizedTask) -> str:
    """Eight characters that identify everything that determines the trained weights, so that only the same run resumes.

    Different weights under the same backbone name change it. The store's location and the number of shuffles do not.
    """
    backbone = recipe.backbone
    model = identify(backbone.model, resolve(backbone.model), backbone.revision)
    weights = model["revision"] or model["sha256"]  # a commit is known before the weights are downloaded
    determining = replace(recipe, store=StoreConfig(root="any", copies="any", dtype=recipe.store.dtype), shuffles=1)
    return hashlib.sha256(f"{determining!r}{weights}{task.identity['sha256']}".encode()).hexdigest()[:8]
