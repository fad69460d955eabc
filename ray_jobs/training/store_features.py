"""Fill the feature store before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_storage, store_in
from ray_jobs.ray_internals import in_submitted_job
from ray_jobs.training.config import FeaturesJob
from ray_jobs.training.feature_pass import fill_stores
from revmux.data.task import load_task
from revmux.errors import UserError
from revmux.features.tokens import tokenize_task
from revmux.methods import BackboneShape
from revmux.pretrained.loading import check_answers, inspect
from revmux.training.config import Recipe
from revmux.utils.redact import without_passwords


def run_features(job: FeaturesJob) -> None:
    """Run the whole job: read the data, connect to the cluster, and fill the stores."""
    storage = storage_of(job)
    if storage is not None:
        job = replace(job, store=store_in(storage, job.store))
    job.cluster.check_here()
    check_answers(job.backbone)
    shape, own_labels = inspect(job.backbone)
    check_layers(job.layers, shape)
    task = load_task(job.data, own_labels)
    recipe = Recipe(job.backbone, job.data, store=job.store)
    with connected(job.cluster, storage):
        fill_stores(recipe, job.layers, tokenize_task(task, job.backbone, job.store), job.cluster)
    root = without_passwords(str(job.store.root))
    print(f"features: complete in {root}; revmux cache ls --root {root}")


def storage_of(job: FeaturesJob) -> str | None:
    """The storage; None for a submitted job that sets only ``store.root``, which needs no other folder."""
    if job.store.root is not None and in_submitted_job() and job.storage == FeaturesJob.storage:
        return None
    return absolute_storage(job.storage)


def check_layers(layers: Sequence[int], shape: BackboneShape) -> None:
    """Check that the backbone has the given depths, before it is loaded.

    Raises:
        UserError: a depth is out of range; the message names the valid ones.
    """
    for layer in layers:
        if not 0 <= layer <= shape.num_layers:
            raise UserError(
                f"layers contains {layer}, but the backbone has {shape.num_layers} layers; choose 0..{shape.num_layers}"
            )
