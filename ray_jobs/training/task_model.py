"""Tune a backbone to a task on a cluster."""

from __future__ import annotations

from dataclasses import replace

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_location, recording_storage, store_in
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.config import FinetuneJob
from ray_jobs.training.launch import Trained, launch, load_checked
from revmux.data.task import TaskData
from revmux.features.config import StoreConfig
from revmux.features.tokens import tokenize_task
from revmux.utils.copies import join_location
from revmux.utils.redact import without_passwords


def tune_model(job: FinetuneJob, task: TaskData, tracker: Tracker, storage: str) -> Trained:
    """Tune the task model on a connected cluster with data that is already loaded."""
    output = absolute_location(job.output, "output") if job.output else join_location(storage, "task-model")
    recipe = replace(job.recipe(), store=store_in(storage, StoreConfig()))
    tokens = tokenize_task(task, recipe.backbone, recipe.store)
    trained = launch(recipe, tokens, job.cluster, tracker, storage, job.name, output, checkpoint=job.checkpoint)
    trained.forget()
    accuracy = trained.metrics["accuracy_mean"]
    print(f"task model: {without_passwords(trained.folder)}, accuracy on the test split {accuracy:.1%}")
    return trained


def run_finetune(job: FinetuneJob) -> Trained:
    """Run the whole job: read the data, connect to the cluster, then tune, evaluate and record the task model."""
    storage = recording_storage(job.storage, job.tracking.uri)
    job.cluster.check_training()
    task = load_checked([job.recipe()], job.cluster.workers)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        return tune_model(job, task, tracker, storage)
