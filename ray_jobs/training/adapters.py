"""Train adapters on a frozen task model on a cluster, one after another for each N."""

from __future__ import annotations

from dataclasses import replace

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_location, recording_storage, store_in
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.config import TrainJob
from ray_jobs.training.feature_pass import fill_stores_for
from ray_jobs.training.launch import Trained, finished_run, launch, load_checked
from revmux.data.task import TaskData
from revmux.features.tokens import tokenize_task
from revmux.utils.copies import join_location
from revmux.utils.redact import without_passwords
from revmux.utils.stored_folder import reading_folder


def train_adapters(job: TrainJob, task: TaskData, tracker: Tracker, storage: str) -> list[Trained]:
    """Train the job's adapters on a connected cluster, one run after another. A job that was stopped skips finished runs.

    Args:
        job: settings, with the store's root set.
        task: the data.
        tracker: records the runs.
        storage: absolute storage.
    """
    output = absolute_location(job.output, "output") if job.output else join_location(storage, "adapters")
    recipes, done = job.recipes(), []
    print(f"features: stored in {without_passwords(str(job.store.root))}", flush=True)
    tokens = tokenize_task(task, job.backbone, job.store)
    if job.cluster.workers > 1:  # a single worker fills the store itself just as well
        fill_stores_for(list(recipes.values()), tokens, job.cluster)
    for name, recipe in recipes.items():
        target = join_location(output, name)
        earlier = finished_run(recipe, tokens, tracker, storage, name, target)
        registered = None
        if earlier is not None:
            trained, registered = earlier
            print(f"{name}: trained before this job was stopped: {without_passwords(trained.folder)}")
        else:
            trained = launch(recipe, tokens, job.cluster, tracker, storage, name, target, checkpoint=job.checkpoint)
        metrics = trained.metrics
        print(
            f"{name}: accuracy {metrics['accuracy_mean']:.1%} ± {metrics['accuracy_std']:.1%} over {job.shuffles} "
            f"shuffles (SISO {metrics['siso_accuracy']:.1%}), agreement {metrics['siso_agreement']:.1%}, "
            f"cost {metrics['cost_counted']:.2f} of SISO: {without_passwords(trained.folder)}"
        )
        if job.register and job.register != registered:
            tags = {"method": recipe.method.name, "num_inputs": recipe.method.num_inputs}
            tags |= {"prefill_layers": recipe.method.prefill_layers}
            tags |= {key: f"{metrics[key]:.4f}" for key in ("accuracy_mean", "siso_accuracy", "cost_counted")}
            backbone = job.backbone.model if job.register_backbone else None
            with reading_folder(trained.folder) as adapter:
                version = tracker.register(trained.run_id, adapter, job.register, tags, backbone, task.is_pair)
            print(f"registered: models:/{job.register}/{version}")
        trained.keep(recipe, job.register)
        done.append(trained)
    for trained in done:
        trained.forget()
    return done


def run_train(job: TrainJob) -> list[Trained]:
    """Run the whole job: read the data, connect to the cluster, then train, evaluate and record one adapter per N."""
    storage = recording_storage(job.storage, job.tracking.uri)
    job = replace(job, store=store_in(storage, job.store))
    job.cluster.check_training()
    task = load_checked(list(job.recipes().values()), job.cluster.workers)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        return train_adapters(job, task, tracker, storage)
