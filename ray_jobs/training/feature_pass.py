"""Fill the feature stores of a task with Ray Data."""

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
from ray_jobs.training.on_worker import run_on_worker
from ray_jobs.training.progress_board import Poster
from revmux.data.tokens import SplitTokens
from revmux.errors import UserError
from revmux.features.budget import Probe, probe
from revmux.features.key import backbone_digest
from revmux.features.precision import Precision
from revmux.features.shards import PART_INPUTS
from revmux.features.store import NotSeenError, StoreBuilder
from revmux.features.tokens import TokenizedTask
from revmux.features.writer import FeaturePass
from revmux.pretrained.loading import inspect, load_outline
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import Recipe
from revmux.training.recipe import check_labels, layers_read, load_backbone, tokens_of
from revmux.utils.redact import without_passwords

Work = list[tuple[FeaturePass, SplitTokens]]
Known = tuple[str | None, Probe | None]
"""What only a loaded backbone tells a :class:`revmux.features.store.StoreBuilder`; None if it is loaded."""


def fill_stores(
    recipe: Recipe, layers: Sequence[int], task: TokenizedTask, cluster: ClusterConfig, workers: int | None = None
) -> None:
    """Complete the stores of a task's splits with a Ray Data job in which each worker computes and writes shards.

    A pass that was stopped resumes, and the shard of a lost worker is given to another worker. If two jobs need the
    same store, one waits until the other has completed it. This process loads the backbone only if all work runs on this
    machine, and then computes the missing inputs itself if they fit in one shard, because starting workers would take
    longer. Otherwise a worker loads and hashes it.

    Args:
        recipe: the backbone and the store; other settings are ignored.
        layers: depths of the states to store, in addition to the teacher.
        task: the task's tokens.
        cluster: resources per worker; already connected.
        workers: maximum number of workers; by default that of ``cluster``.

    Raises:
        UserError: a layer is out of range, a state does not fit the store's type, or the store cannot be written.
        NotSeenError: this process does not see the files that the workers wrote.
    """
    if cluster.is_this_machine:
        pretrained = load_backbone(recipe, task.label_names)
        check_labels(pretrained, task)
        known: Known = (None, None)
    else:
        pretrained = load_outline(recipe.backbone, task.label_names)
        check_labels(pretrained, task)
        known = run_on_worker("the feature pass", cluster, _inspect_weights, recipe, task)
    pretrained.backbone.freeze()
    builders = _builders(pretrained, recipe, layers, task, *known)
    verify = builders[0].root.local  # hashing reads everything, so the training workers verify a remote store
    with ExitStack() as stack:
        work = [
            (stack.enter_context(builder.filling(verify)), builder.split)
            for builder in builders
            if not builder.complete(verify)
        ]
        total = sum(len(todo.layout.rows(index)) for todo, _ in work for index in todo.missing)
        if total:
            names = ", ".join(map(str, sorted({layer for todo, _ in work for layer in todo.layers}))) or "none"
            print(
                f"features: {total:,} inputs, layers {names}: {without_passwords(str(recipe.store.root))}", flush=True
            )
            if total <= (recipe.store.shard_inputs or PART_INPUTS) and cluster.is_this_machine:
                losses = _write_in_process(work, pretrained, total)
            else:
                losses = _write_with_workers(work, recipe, task.label_names, cluster, workers or cluster.workers, total)
            for layer, parts in sorted(losses.items()):
                print(f"features: layer {layer} in {recipe.store.dtype}: {Precision.of(parts)}")


def fill_stores_for(
    recipes: Sequence[Recipe], task: TokenizedTask, cluster: ClusterConfig, workers: int | None = None
) -> None:
    """Fill the stores that runs will read, before their workers start.

    Args:
        recipes: runs that differ only in method and optimization.
        task: their tokens.
        cluster: see :func:`fill_stores`.
        workers: see :func:`fill_stores`.

    Raises:
        UserError: see :func:`fill_stores`.
    """
    shape, _ = inspect(recipes[0].backbone)
    needed = [layers for recipe in recipes if (layers := layers_read(recipe, shape)) is not None]
    if not needed:
        return
    try:
        fill_stores(recipes[0], sorted({layer for layers in needed for layer in layers}), task, cluster, workers)
    except NotSeenError as error:
        print(f"features: {error}; each machine completes its own copy for now", flush=True)


class ShardWorker:
    """A worker of the feature pass, which loads the backbone once and then writes one shard after another.

    Args:
        recipe: the backbone; other settings are ignored.
        label_names: the task's classes.
        work: reference to the stores and the location of their splits. Workers map the tokens themselves.
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
        """Write shards ``batch["shard"]`` of stores ``batch["store"]``; a ``UserError`` is returned, not raised.

        The backbone is loaded here because Ray Data passes on return values but not an exception of the constructor.
        """
        outcomes: list[dict[str, Any]] = []
        for number, index in zip(batch["store"].tolist(), batch["shard"].tolist(), strict=True):
            todo, split = self.work[number]
            try:
                losses = todo.write_shard(self._backbone(todo).backbone, split, index)
                outcomes.append({"losses": {layer: asdict(loss) for layer, loss in losses.items()}})
            except UserError as error:
                outcomes.append({"problem": str(error)})
        return batch | {"outcome": np.array([json.dumps(outcome) for outcome in outcomes])}

    def _backbone(self, todo: FeaturePass) -> Pretrained:
        if self.pretrained is None:
            pretrained = load_backbone(self.recipe, self.label_names)
            todo.check_backbone(pretrained.backbone)
            pretrained.backbone.freeze().to(self.device)
            self.pretrained = pretrained
        return self.pretrained


def _inspect_weights(recipe: Recipe, task: TokenizedTask) -> Known:
    pretrained = load_backbone(recipe, task.label_names)
    backbone = pretrained.backbone.freeze()
    return backbone_digest(backbone), probe(backbone, tokens_of(task, pretrained, recipe)[0])


def _builders(
    pretrained: Pretrained,
    recipe: Recipe,
    layers: Sequence[int],
    task: TokenizedTask,
    weights: str | None,
    probed: Probe | None,
) -> list[StoreBuilder]:
    """One builder per store, sorted by key, so that all jobs lock several stores in the same order."""
    found = [
        StoreBuilder(pretrained, split, layers, recipe.store, weights=weights, probed=probed)
        for split in tokens_of(task, pretrained, recipe)
    ]
    return sorted({builder.key: builder for builder in found}.values(), key=lambda builder: builder.key)


def _write_with_workers(
    work: Work, recipe: Recipe, label_names: list[str], cluster: ClusterConfig, workers: int, total: int
) -> dict[int, list[Precision]]:
    """Write all missing shards with Ray Data workers; returns, per layer, the rounding loss of each shard."""
    import ray
    from ray.data import ActorPoolStrategy, from_items

    from ray_jobs.training.resource_wait import wait_for_resources

    wait_for_resources("the feature pass", cluster)
    shards = [{"store": number, "shard": index} for number, (todo, _) in enumerate(work) for index in todo.missing]
    shards.sort(key=lambda shard: -len(work[shard["store"]][0].layout.rows(shard["shard"])))  # the largest first
    data = from_items(shards, override_num_blocks=len(shards))  # one block per shard: Ray Data retries blocks
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.max_consecutive_actor_init_deaths = cluster.max_failures
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    references = ray.put(work)  # shared by all workers; this reference keeps it for restarted ones
    written = data.map_batches(
        ShardWorker,
        batch_size=None,
        fn_constructor_kwargs={
            "recipe": recipe,
            "label_names": label_names,
            "work": references,
            "device": "cuda" if cluster.use_gpu else "cpu",
            "threads": 0 if cluster.use_gpu else max(1, int(cluster.cpus_per_worker)),
        },
        compute=ActorPoolStrategy(min_size=1, max_size=min(workers, len(shards))),
        **cluster.remote_options,
    )
    losses: dict[int, list[Precision]] = {}
    progress = _Progress(total)
    for batch in written.iter_batches(batch_size=None, batch_format="numpy"):
        assert isinstance(batch, dict)
        for number, index, outcome in _rows(batch):
            if "problem" in outcome:
                raise UserError(outcome["problem"])
            for layer, loss in outcome["losses"].items():
                losses.setdefault(int(layer), []).append(Precision(**loss))
            progress.add(len(work[number][0].layout.rows(index)))
    return losses


def _write_in_process(work: Work, pretrained: Pretrained, total: int) -> dict[int, list[Precision]]:
    """:func:`_write_with_workers` in this process, which has already loaded the backbone."""
    losses: dict[int, list[Precision]] = {}
    progress = _Progress(total)
    for todo, split in work:
        for index in todo.missing:
            for layer, loss in todo.write_shard(pretrained.backbone, split, index).items():
                losses.setdefault(layer, []).append(loss)
            progress.add(len(todo.layout.rows(index)))
    return losses


def _rows(batch: dict[str, np.ndarray]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for number, index, outcome in zip(
        batch["store"].tolist(), batch["shard"].tolist(), batch["outcome"].tolist(), strict=True
    ):
        yield number, index, json.loads(outcome)


class _Progress:
    """A progress bar on a terminal; otherwise one printed line per tenth of the inputs.

    Args:
        total: inputs in the pass.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.printed_tenths = total, 0, 0
        self.started = time.perf_counter()
        self.bar = tqdm(total=total, desc="features", unit=" inputs", disable=None)
        self.poster = Poster("features")

    def add(self, inputs: int) -> None:
        """Count inputs that were stored."""
        self.done += inputs
        self.bar.update(inputs)
        self.poster.post(self.done, self.total)
        if self.done == self.total:
            self.bar.close()
        if self.bar.disable and 10 * self.done // self.total > self.printed_tenths:
            self.printed_tenths = 10 * self.done // self.total
            rate = self.done / (time.perf_counter() - self.started)
            print(
                f"features: {self.done:,} of {self.total:,} inputs, {rate:.0f} inputs/s, "
                f"{(self.total - self.done) / rate:.0f} s left",
                flush=True,
            )
