"""Feature stores on other filesystems, and their copies on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from feature_stores import (
    INPUTS,
    bert,
    corrupt,
    expect_equal,
    no_settling,
    pretrained,
    same,
    shard_files,
    small_store,
    split,
)
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

from revmux import UserError
from revmux.features.cache_cli import list_stores, remove_stores
from revmux.features.config import StoreConfig
from revmux.features.store import open_features
from revmux.utils.place import Place

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    no_settling(monkeypatch)


def test_a_root_may_be_a_uri(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    store = open_features(model, tokens, [1], same(config, root=Path(config.root).as_uri()))
    expect_equal(store, model.backbone, tokens, 1, 1e-5)
    files = shard_files(config)
    assert open_features(model, tokens, [1], config).key == store.key
    assert shard_files(config) == files


@pytest.mark.parametrize("kind", ["subtree", "memory"])
def test_any_fsspec_filesystem_can_be_used(config: StoreConfig, tmp_path: Path, kind: str) -> None:
    filesystem = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    if kind == "memory":
        filesystem = FileSystem.from_uri("mock:///")[0]
    model, tokens = pretrained(bert()), split()
    remote = same(config, root="deep/features")
    for layers in ([1], [1], [1, 2]):
        store = open_features(model, tokens, layers, remote, filesystem)
        expect_equal(store, model.backbone, tokens, layers[-1], 1e-5)
    assert [info.key for info in list_stores(remote.root, filesystem)] == [store.key]
    remove_stores([store.key], remote.root, filesystem=filesystem)
    assert list_stores(remote.root, filesystem) == []
    assert [info.key for info in list_stores(config.copies)] == [store.key], "copies are listed and freed like stores"


def test_only_the_shards_that_are_read_are_copied_and_mapped(config: StoreConfig, tmp_path: Path) -> None:
    filesystem, remote = SubTreeFileSystem(str(tmp_path), LocalFileSystem()), same(config, root="deep/features")
    model, tokens = pretrained(bert()), split()
    open_features(model, tokens, [1], remote, filesystem)
    shutil.rmtree(config.copies)
    view = open_features(model, tokens, [1], remote, filesystem).at(1)
    copied = shard_files(same(config, root=config.copies))
    assert {path.name.partition(".")[0] for path in copied} == {"shard-00000"}, "checked against the backbone"
    view.batch([INPUTS - 1])
    later = {path.name.partition(".")[0] for path in shard_files(same(config, root=config.copies))}
    assert later == {"shard-00000", "shard-00002"}


def test_workers_that_copy_at_the_same_time_do_not_remove_each_others_files(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process opens the store while the other has written a copy but not yet renamed it."""
    filesystem, remote = SubTreeFileSystem(str(tmp_path), LocalFileSystem()), same(config, root="deep/features")
    model, tokens = pretrained(bert()), split()
    open_features(model, tokens, [1], remote, filesystem)
    shutil.rmtree(config.copies)
    rename, opened = os.replace, []

    def open_before_renaming(source: str, target: str) -> None:
        if not opened and Path(target).name == "meta.json":
            opened.append(str(target))
            opened.append(open_features(model, tokens, [1], remote, filesystem))
        rename(source, target)

    monkeypatch.setattr(os, "replace", open_before_renaming)
    store = open_features(model, tokens, [1], remote, filesystem)
    assert opened[0] == f"{config.copies}/{store.key}/meta.json"
    expect_equal(store, model.backbone, tokens, 1, 1e-5)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_removal_of_stale_files_ignores_files_already_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = Place.open(str(tmp_path / "swept") if kind == "local" else "mock:///swept")
    place.create()
    place.write("left.tmp", b"half")
    place.write("whole", b"whole")
    listed = ["gone.tmp", *place.files()]
    with monkeypatch.context() as patch:
        patch.setattr(place, "files", lambda: listed)
        place.sweep()
    assert place.files() == ["whole"]


@pytest.mark.parametrize("side", ["deep", "copies"])
def test_remote_shards_are_copied_once_and_damaged_copies_are_replaced(
    config: StoreConfig, tmp_path: Path, side: str
) -> None:
    filesystem, remote = SubTreeFileSystem(str(tmp_path), LocalFileSystem()), same(config, root="deep/features")
    model, tokens = pretrained(bert()), split()
    for _ in range(2):
        expect_equal(open_features(model, tokens, [1], remote, filesystem), model.backbone, tokens, 1, 1e-5)
    files = {folder: shard_files(same(config, root=str(tmp_path / folder))) for folder in ("deep", "copies")}
    assert {path.name for path in files["deep"]} == {path.name for path in files["copies"]}
    damaged = next(iter(files[side]))
    corrupt(damaged)
    if side == "deep":
        shutil.rmtree(config.copies)
        with pytest.raises(UserError, match=r"was damaged and has been removed; start again to rewrite it"):
            open_features(model, tokens, [1], remote, filesystem)
    expect_equal(open_features(model, tokens, [1], remote, filesystem), model.backbone, tokens, 1, 1e-5)
    after = shard_files(same(config, root=str(tmp_path / side)))
    assert after.keys() == files[side].keys()
    assert {path for path in after if after[path] != files[side][path]} == {damaged}


def test_a_folder_that_disappears_while_it_is_listed_has_no_files(
    tmp_path: Path,
) -> None:
    class Vanishing:
        def get_file_info(self, selector: object) -> None:
            raise FileNotFoundError("cannot list the folder")

    place = Place.open(str(tmp_path))
    assert place.files() == []
    (tmp_path / "shard").write_bytes(b"12")
    assert (place.files(), place.size()) == (["shard"], 2)
    place = Place(Vanishing(), str(tmp_path))  # type: ignore[arg-type]
    assert (place.files(), place.folders(), place.size()) == ([], [], 0)
