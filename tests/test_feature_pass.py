"""The feature pass on a cluster: workers write the same as one process, lost workers are replaced, no work is repeated."""

from __future__ import annotations

import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from polling import wait_until
from transformers import AutoTokenizer, BertForSequenceClassification

from ray_jobs.cluster import ClusterConfig
from ray_jobs.features import main
from ray_jobs.training.config import FeaturesJob
from ray_jobs.training.feature_pass import ShardWorker, fill_stores, fill_stores_for
from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.task import TaskData, load_task
from revmux.features.config import StoreConfig
from revmux.features.store import NotSeenError, StoreBuilder, open_features
from revmux.features.tokens import tokenize_task
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import prepare, tokens_of

pytestmark = [pytest.mark.cluster("shared"), pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]
LAYERS = [1, 2]
CLUSTER = ClusterConfig(address="local", workers=2)


@pytest.fixture(scope="module")
def data(tiny_csv: Path) -> DataConfig:
    return DataConfig(source=str(tiny_csv))


@pytest.fixture(scope="module")
def task(data: DataConfig) -> TaskData:
    return load_task(data)


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> Recipe:
    """Store one input per shard, so that the pass has many shards."""
    store = StoreConfig(root=str(tmp_path / "features"), dtype="bfloat16", shard_inputs=1)
    return Recipe(BackboneConfig(str(tiny_model_folder), max_length=16), store=store)


def shards(recipe: Recipe) -> dict[Path, int]:
    found = (path for path in sorted(Path(recipe.store.root).rglob("*.arrow")) if path.parent.name != "tokens")
    return {path: path.stat().st_mtime_ns for path in found}


def shard_workers() -> list[psutil.Process]:
    """Return the processes of this test's cluster that write shards."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if ShardWorker.__name__ in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def write_five(builder: StoreBuilder) -> None:
    with builder.filling() as missing:
        for index in missing.missing[:5]:
            missing.write_shard(builder.backbone, builder.split, index)


def kill_a_worker(recipe: Recipe, after: int, jobs: list[Future[None]]) -> int:
    """Kill one as soon as more than ``after`` shards exist; return their number."""

    def killed() -> int:
        there = len(shards(recipe))
        if there <= after or not (workers := shard_workers()):
            return 0
        workers[0].send_signal(signal.SIGKILL)
        return there

    def over() -> str | None:
        return f"the pass ended before a worker was killed: {jobs}" if any(job.done() for job in jobs) else None

    return wait_until(killed, every=0.001, failure=over)


def test_a_feature_pass_completes_although_a_worker_is_killed(
    recipe: Recipe,
    data: DataConfig,
    task: TaskData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretrained = load_pretrained(recipe.backbone)
    pretrained.backbone.freeze()
    tokens = tokenize_task(task, recipe.backbone, recipe.store)
    splits = tokens_of(tokens, pretrained, recipe)
    with pytest.raises(NotSeenError):
        write_five(StoreBuilder(pretrained, splits[0], LAYERS, recipe.store))
    before = shards(recipe)
    assert len(before) == 15  # a teacher and two layers each
    total = 3 * sum(map(len, splits))

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fill_stores, recipe, LAYERS, tokens, CLUSTER) for _ in range(2)]
        assert kill_a_worker(recipe, len(before), jobs) < total
    for job in jobs:
        job.result()
    filled = shards(recipe)
    assert len(filled) == total, "each shard is written once, although two jobs need it"
    assert {path: filled[path] for path in before} == before
    assert capsys.readouterr().out.count("layer 2 in bfloat16: states lose") == 1, "only one of the jobs did the work"

    main(FeaturesJob(recipe.backbone, data, LAYERS, recipe.store, CLUSTER, str(tmp_path)))
    assert "features: complete in" in capsys.readouterr().out
    prepared = prepare(replace(recipe, method=MethodConfig(prefill_layers=2)), tokens)
    assert shards(recipe) == filled, "another job or a run that only reads must not write"

    local = replace(recipe.store, root=str(tmp_path / "local"), shard_inputs=64)
    for split, read in zip(splits, (prepared.train, prepared.selection, prepared.test), strict=True):
        batch, alone = read.batch(range(len(split))), open_features(pretrained, split, [2], local).at(2)
        expected = alone.batch(range(len(split)))
        assert batch.prefilled is not None
        assert expected.prefilled is not None
        torch.testing.assert_close(batch.prefilled.hidden, expected.prefilled.hidden, atol=2**-8, rtol=2**-7)
        torch.testing.assert_close(batch.teacher_scores, expected.teacher_scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.teacher_vectors, expected.teacher_vectors, atol=1e-5, rtol=1e-5)


def test_a_feature_pass_reports_missing_machines_and_ends_after_the_limit(recipe: Recipe, task: TaskData) -> None:
    cores = ray.cluster_resources()["CPU"]
    large = replace(CLUSTER, cpus_per_worker=cores + 1, wait_minutes=0.02)
    words = (
        rf"few resources for the workers of the feature pass .*: 1 × {cores + 1:g} CPU; the cluster has {cores:g} CPU"
    )
    with pytest.raises(UserError, match=words):
        fill_stores(recipe, LAYERS, tokenize_task(task, recipe.backbone, recipe.store), large)


def test_a_user_error_in_a_worker_is_printed_on_one_line(recipe: Recipe, task: TaskData, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(recipe.backbone.model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight.mul_(1e6)
    folder = tmp_path / "large"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe.backbone.model).save_pretrained(folder)
    narrow = replace(recipe, store=replace(recipe.store, dtype="float16"))
    large = replace(narrow, backbone=replace(recipe.backbone, model=str(folder)))
    tokens = tokenize_task(task, large.backbone, large.store)
    with pytest.raises(UserError, match=r"float16 cannot hold the states of layer 1.*bfloat16 or float32"):
        fill_stores_for([replace(large, method=MethodConfig(prefill_layers=1))], tokens, replace(CLUSTER, workers=1))


def test_layers_are_checked_before_a_cluster_starts(recipe: Recipe, data: DataConfig, tmp_path: Path) -> None:
    job = FeaturesJob(recipe.backbone, data, [9], recipe.store, storage=str(tmp_path))
    with pytest.raises(UserError, match=r"layers contains 9, but the backbone has 3 layers; choose 0..3"):
        main(job)
