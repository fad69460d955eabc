"""What damage, interruption and other processes leave of a feature store: complete shards are kept, others written again."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Any

import pytest
from feature_stores import bert, corrupt, expect_equal, pretrained, shard_files, small_store, split

from revmux import UserError
from revmux.features.config import StoreConfig
from revmux.features.shards import ShardSet, ShardWriter
from revmux.features.store import StoreBuilder, open_features
from revmux.utils import content_hash

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    """Replace the content by that of another shard, which is a complete file."""
    path.write_bytes(max(path.parent.glob("*.arrow")).read_bytes())


@pytest.mark.parametrize("damage", [Path.unlink, truncate, corrupt, swap])
@pytest.mark.parametrize("folder", ["teacher", "layer-001-float32"])
def test_damaged_shards_are_written_again(config: StoreConfig, damage: Callable[[Path], None], folder: str) -> None:
    model, tokens = pretrained(bert()), split()
    open_features(model, tokens, [1], config)
    intact = shard_files(config)
    damaged = next(path for path in intact if path.parent.name == folder)
    damage(damaged)
    expect_equal(open_features(model, tokens, [1], config), model.backbone, tokens, 1, 1e-5)
    mended = shard_files(config)
    assert mended.keys() == intact.keys()
    assert {path for path in intact if mended[path] != intact[path]} == {damaged}


def test_a_process_hashes_a_shard_again_only_if_it_changed(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = pretrained(bert()), split()
    monkeypatch.setattr(content_hash, "SETTLED_NS", 0)
    open_features(model, tokens, [1], config)
    hashed: list[str] = []
    monkeypatch.setattr(
        content_hash.hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or file_digest(file, kind)
    )
    open_features(model, tokens, [1], config)
    assert not hashed
    damaged = next(iter(shard_files(config)))
    corrupt(damaged)
    expect_equal(open_features(model, tokens, [1], config), model.backbone, tokens, 1, 1e-5)
    assert {Path(name).parent for name in hashed} == {damaged.parent}


def test_a_touched_but_unchanged_shard_is_kept(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    open_features(model, tokens, [1], config)
    path = next(iter(shard_files(config)))
    os.utime(path, ns=(1, 1))
    open_features(model, tokens, [1], config)
    assert shard_files(config)[path] == 1


def test_a_full_disk_keeps_complete_shards(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    teacher = open_features(model, tokens, [], config)
    kept = shard_files(config)
    largest = max(path.stat().st_size for path in kept)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))  # states take more space than the teacher
    try:
        with pytest.raises(UserError, match=r"cannot write .*shard-00000.*free some space.*complete files are kept"):
            open_features(model, tokens, [1], config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert shard_files(config) == kept
    assert not list(Path(config.root).rglob("*.tmp"))
    store = open_features(model, tokens, [1], config)
    assert store.key == teacher.key
    expect_equal(store, model.backbone, tokens, 1, 1e-5)


def test_shards_that_workers_wrote_elsewhere_are_reported_as_missing(config: StoreConfig) -> None:
    builder = StoreBuilder(pretrained(bert()), split(), [1], config)
    with (
        pytest.raises(UserError, match=r"cannot see the shards .*; name a root that every node reaches"),
        builder.filling(),
    ):
        pass


def test_a_worker_with_another_backbone_is_refused(config: StoreConfig) -> None:
    with StoreBuilder(pretrained(bert()), split(), [1], config).filling() as missing:
        missing.write(bert(), split())
    missing.check_backbone(bert())
    with pytest.raises(UserError, match="another backbone"):
        missing.check_backbone(bert(seed=1))


def test_an_interrupted_store_is_completed_by_the_next_process(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = pretrained(bert()), split()
    add, started = ShardWriter.add, []

    def fail_late(writer: ShardWriter, columns: Any) -> None:
        if writer not in started:
            started.append(writer)
        if len(started) == 4:
            raise KeyboardInterrupt
        add(writer, columns)

    monkeypatch.setattr(ShardWriter, "add", fail_late)
    with pytest.raises(KeyboardInterrupt):
        open_features(model, tokens, [1], config)
    monkeypatch.undo()
    before = shard_files(config)
    assert len(before) == 2, "the teacher and the layer of the first shard"
    Path(next(iter(before)).parent, "shard-00001.0.tmp").write_bytes(b"half a shard of a killed process")
    expect_equal(open_features(model, tokens, [1], config), model.backbone, tokens, 1, 1e-5)
    after = shard_files(config)
    assert {path: after[path] for path in before} == before
    assert not list(Path(config.root).rglob("*.tmp"))


def open_and_log(config: StoreConfig, log: str, barrier: Any) -> None:
    """One of several processes that open the same store; it records every shard that it writes."""
    writing = ShardSet.writing

    def noted(shards: ShardSet, index: int, *notes: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {shards.place.path} {index}\n")
        return writing(shards, index, *notes)

    backbone, tokens = bert(), split()
    barrier.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardSet, "writing", noted)
        expect_equal(open_features(pretrained(backbone), tokens, [1], config), backbone, tokens, 1, 1e-5)


def test_concurrent_processes_compute_the_same_store_once(config: StoreConfig, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log, barrier = tmp_path / "log", context.Barrier(2)
    other = context.Process(target=open_and_log, args=(config, str(log), barrier))
    other.start()
    open_and_log(config, str(log), barrier)
    other.join()
    assert other.exitcode == 0
    lines = log.read_text().splitlines()
    assert len(lines) == len(shard_files(config))
    assert len({line.split()[0] for line in lines}) == 1
