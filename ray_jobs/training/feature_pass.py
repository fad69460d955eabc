"""Fills the feature stores of a task with Ray Data."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ray_jobs.cluster import ClusterConfig
from revmux.data.task import TaskData
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.features.precision import Precision
from revmux.features.store import NotSeenError, StoreBuilder
from revmux.features.writer import FeaturePass
from revmux.pretrained.loading import inspect
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import Recipe
from revmux.training.recipe import check_labels, layers_read, load_backbone

Work = list[tuple[FeaturePass, TokenizedSplit]]


def fill_stores(
    recipe: Recipe, layers: Sequence[int], task: TaskData, cluster: ClusterConfig, workers: int | None = None
) -> None:
    """Complete the stores of a task's splits by a Ray Data job: each worker computes shards and writes them itself.

    A pass that was stopped goes on where it was, a lost worker's shard is given to another, and where two jobs ask
    for the same store one of them waits and finds it complete. On this machine alone, what is less than a shard's worth
    of inputs in all is computed in this process, before others would have started.

    Args:
        recipe: whose backbone and store count.
        layers: depths whose states are wanted, beside the teacher.
        task: its data.
        cluster: what a worker takes; connected already.
        workers: at most so many, in place of the cluster's.

    Raises:
        UserError: a layer out of range, a state that the store's type cannot hold, a place that cannot be written.
        NotSeenError: what the workers wrote is not seen from here.
    """
    pretrained = load_backbone(recipe, task.label_names)
    check_labels(pretrained, task)
    pretrained.backbone.freeze()
    builders = _builders(pretrained, recipe, layers, task)
    verify = builders[0].root.local  # hashing is reading: of a remote store, that is for those who train
    with ExitStack() as stack:
        work = [
            (stack.enter_context(builder.filling(verify)), builder.split)
            for builder in builders
            if not builder.complete(verify)
        ]
        total = sum(len(todo.shard_rows[index]) for todo, _ in work for index in todo.missing)
        if total:
            places = ", ".join(map(str, sorted({layer for todo, _ in work for layer in todo.layers}))) or "none"
            print(f"features: {total:,} inputs, layers {places}: {recipe.store.root}", flush=True)
            if total <= recipe.store.shard_inputs and cluster.is_this_machine:
                losses = _write_here(work, pretrained, total)
            else:
                losses = _write(work, recipe, task.label_names, cluster, workers or cluster.workers, total)
            for layer, parts in sorted(losses.items()):
                print(f"features: layer {layer} in {recipe.store.dtype}: {Precision.of(parts)}")


def fill_for(recipes: Sequence[Recipe], task: TaskData, cluster: ClusterConfig, workers: int | None = None) -> None:
    """Fill what runs are going to read, before their workers start.

    Args:
        recipes: runs that differ in method and optimisation alone.
        task: their data.
        cluster: see :func:`fill_stores`.
        workers: see :func:`fill_stores`.

    Raises:
        UserError: as :func:`fill_stores`.
    """
    shape, _ = inspect(recipes[0].backbone)
    read = [layers for recipe in recipes if (layers := layers_read(recipe, shape)) is not None]
    if not read:
        return
    try:
        fill_stores(recipes[0], sorted({layer for layers in read for layer in layers}), task, cluster, workers)
    except NotSeenError as error:
        print(f"features: {error}; for now every machine completes its own", flush=True)


class ShardWorker:
    """A worker of the pass: loads the backbone once, then writes one shard after the other.

    Args:
        recipe: whose backbone counts.
        label_names: the task's classes.
        work: reference to the stores and their splits; tokens are all that crosses Ray's object store.
        device: where the backbone runs.
        threads: CPU threads; 0 leaves torch's default.
    """

    def __init__(self, recipe: Recipe, label_names: list[str], work: Any, device: str, threads: int) -> None:
        import ray

        logging.getLogger().setLevel(logging.WARNING)
        disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.recipe, self.label_names, self.device = recipe, label_names, device
        self.work: Work = ray.get(work)
        self.pretrained: Pretrained | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write shards ``batch["shard"]`` of stores ``batch["store"]``; a mistake of the user's is told, not raised.

        Loading belongs here, since Ray Data hands over what is returned but not what a constructor raises.
        """
        told: list[dict[str, Any]] = []
        for number, index in zip(batch["store"].tolist(), batch["shard"].tolist(), strict=True):
            todo, split = self.work[number]
            try:
                losses = todo.write_shard(self._backbone(todo).backbone, split, index)
                told.append({"losses": {layer: asdict(loss) for layer, loss in losses.items()}})
            except UserError as error:
                told.append({"problem": str(error)})
        return batch | {"told": np.array([json.dumps(what) for what in told])}

    def _backbone(self, todo: FeaturePass) -> Pretrained:
        if self.pretrained is None:
            pretrained = load_backbone(self.recipe, self.label_names)
            todo.check_backbone(pretrained.backbone)
            pretrained.backbone.freeze().to(self.device)
            self.pretrained = pretrained
        return self.pretrained


def _builders(pretrained: Pretrained, recipe: Recipe, layers: Sequence[int], task: TaskData) -> list[StoreBuilder]:
    """One a store, in the order of their keys: jobs that lock several lock them in the same order."""
    splits = [
        pretrained.tokenize(split, recipe.backbone.max_length) for split in (task.train, task.selection, task.test)
    ]
    builders = {
        builder.key: builder for builder in (StoreBuilder(pretrained, split, layers, recipe.store) for split in splits)
    }
    return [builder for _, builder in sorted(builders.items())]


def _write(
    work: Work, recipe: Recipe, label_names: list[str], cluster: ClusterConfig, workers: int, total: int
) -> dict[int, list[Precision]]:
    """Have all missing shards written; returns what each layer lost in each."""
    import ray
    from ray.data import ActorPoolStrategy, from_items

    from ray_jobs.training.waiting import wait_for_a_place

    wait_for_a_place("the feature pass", cluster.worker_resources, cluster.wait_minutes)
    shards = [{"store": number, "shard": index} for number, (todo, _) in enumerate(work) for index in todo.missing]
    shards.sort(key=lambda shard: -len(work[shard["store"]][0].shard_rows[shard["shard"]]))  # what takes longest, first
    data = from_items(shards, override_num_blocks=len(shards))  # a block a shard: the unit that is retried
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.max_consecutive_actor_init_deaths = cluster.max_failures
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    tokens = ray.put(work)  # once for all workers, and held here for those that are started again
    written = data.map_batches(
        ShardWorker,
        batch_size=None,
        fn_constructor_kwargs={
            "recipe": recipe,
            "label_names": label_names,
            "work": tokens,
            "device": "cuda" if cluster.use_gpu else "cpu",
            "threads": 0 if cluster.use_gpu else max(1, int(cluster.cpus_per_worker)),
        },
        compute=ActorPoolStrategy(min_size=1, max_size=min(workers, len(shards))),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )
    losses: dict[int, list[Precision]] = {}
    progress = _Progress(total)
    for batch in written.iter_batches(batch_size=None, batch_format="numpy"):
        assert isinstance(batch, dict)
        for number, index, told in _rows(batch):
            if "problem" in told:
                raise UserError(told["problem"])
            for layer, loss in told["losses"].items():
                losses.setdefault(int(layer), []).append(Precision(**loss))
            progress.add(len(work[number][0].shard_rows[index]))
    return losses


def _write_here(work: Work, pretrained: Pretrained, total: int) -> dict[int, list[Precision]]:
    """:func:`_write` in this process, which has the backbone."""
    losses: dict[int, list[Precision]] = {}
    progress = _Progress(total)
    for todo, split in work:
        for index in todo.missing:
            for layer, loss in todo.write_shard(pretrained.backbone, split, index).items():
                losses.setdefault(layer, []).append(loss)
            progress.add(len(todo.shard_rows[index]))
    return losses


def _rows(batch: dict[str, np.ndarray]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for number, index, told in zip(
        batch["store"].tolist(), batch["shard"].tolist(), batch["told"].tolist(), strict=True
    ):
        yield number, index, json.loads(told)


class _Progress:
    """A bar on a terminal, a line every tenth in a log.

    Args:
        total: inputs of the pass.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.told = total, 0, 0
        self.started = time.perf_counter()
        self.bar = tqdm(total=total, desc="features", unit=" inputs", disable=None)

    def add(self, inputs: int) -> None:
        """So many more inputs are stored."""
        self.done += inputs
        self.bar.update(inputs)
        if self.done == self.total:
            self.bar.close()
        if self.bar.disable and 10 * self.done // self.total > self.told:
            self.told = 10 * self.done // self.total
            rate = self.done / (time.perf_counter() - self.started)
            print(
                f"features: {self.done:,} of {self.total:,} inputs, {rate:.0f} inputs/s, "
                f"{(self.total - self.done) / rate:.0f} s left",
                flush=True,
            )
