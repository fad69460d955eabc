"""The feature store: it returns what the backbone computes, ignores incomplete files, and does all work once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from numeric import approx, assert_close
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem
from tiny_models import WORDS, tiny_classifier, tiny_config, word_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from revmux import UserError
from revmux.__main__ import main
from revmux.backbone import Backbone, HiddenState
from revmux.backbone.llama import LlamaBackbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.data.tokens import TokenizedSplit
from revmux.features.cache_cli import format_stores, list_stores, remove_stores
from revmux.features.config import StoreConfig, default_root
from revmux.features.key import backbone_digest
from revmux.features.lease import Lease
from revmux.features.online import OnlineFeatures
from revmux.features.place import Place
from revmux.features.precision import measure_precision
from revmux.features.shards import ShardSet, ShardWriter, assign_shards, inputs_per_shard
from revmux.features.store import StoreBuilder, open_features
from revmux.pretrained.pretrained import Pretrained

pytestmark = pytest.mark.numeric

LAYERS, WIDTH, INPUTS, SHARD = 3, 32, 23, 8
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS) + 5,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def bert(seed: int = 0) -> Backbone:
    return tiny_classifier("bert", seed, **SHAPE)


def modernbert() -> Backbone:
    return tiny_classifier(
        "modernbert", **SHAPE, classifier_pooling="mean", local_attention=6, cls_token_id=2, sep_token_id=3
    )


def llama() -> Backbone:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **SHAPE))
    backbone = LlamaBackbone(model, Verbalizer(("no", "yes"), ((7,), (9, 10))))
    backbone.add_soft_prompt(2)
    return backbone.freeze()


def bart() -> Backbone:
    return tiny_classifier("bart", **SHAPE, decoder_layers=1, decoder_start_token_id=3)


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    core = word_tokenizer(names)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", padding_side=side)


def split(seed: int = 0, max_length: int = 16, side: str = "right") -> TokenizedSplit:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (INPUTS,), generator=random).tolist()
    texts = [
        " ".join(WORDS[word] for word in torch.randint(len(WORDS), (length,), generator=random)) for length in lengths
    ]
    labels = torch.randint(3, (INPUTS,), generator=random).tolist()
    return TokenizedSplit(Dataset.from_dict({"text": texts, "label": labels}), tokenizer(side), max_length)


def pretrained(backbone: Backbone) -> Pretrained:
    return Pretrained(backbone, tokenizer(), {"name": "tiny", "revision": None, "sha256": "same"}, has_head=True)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    folders = {"root": str(tmp_path / "features"), "copies": str(tmp_path / "copies")}
    return StoreConfig(**folders, dtype="float32", batch_size=4, shard_inputs=SHARD)


def same(config: StoreConfig, **changes: Any) -> StoreConfig:
    return StoreConfig(**{**vars(config), **changes})


def shard_files(config: StoreConfig) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(Path(config.root).rglob("*.arrow"))}


def expect_equal(store: Any, backbone: Backbone, tokens: TokenizedSplit, layer: int, tolerance: float) -> None:
    """Check that the store's batches equal the backbone's, for rows in several orders."""
    view, online = store.at(layer), OnlineFeatures(tokens, backbone)
    orders = [torch.randperm(INPUTS, generator=torch.Generator().manual_seed(2))[:9], [3], [5, 5, 0], range(INPUTS)]
    for rows in orders:
        got, expected = view.batch(rows), online.batch(rows)
        with torch.no_grad():
            state = backbone.run(backbone.embed(expected.tokens), layer)
        assert got.tokens is None
        assert got.prefilled.depth == layer
        assert torch.equal(got.prefilled.mask, state.mask)
        assert torch.equal(got.prefilled.answer, state.answer)
        for name in ("positions", "segments", "spans"):
            own, true = getattr(got.prefilled, name), getattr(state, name)
            assert (own is None) == (true is None), name
            assert own is None or torch.equal(own, true), name
        assert got.prefilled.hidden.dtype == backbone.dtype
        difference = (got.prefilled.hidden - state.hidden)[state.mask].abs().max()
        assert difference <= tolerance * max(float(state.hidden[state.mask].abs().max()), 1.0)
        assert not got.prefilled.hidden[~state.mask].any()
        assert torch.equal(got.labels, expected.labels)
        assert_close(got.teacher_vectors, expected.teacher_vectors)
        assert_close(got.teacher_scores, expected.teacher_scores)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_stored_batches_equal_the_output_of_the_backbone(config: StoreConfig, dtype: str, tolerance: float) -> None:
    backbone, tokens = bert(), split()
    backbone.train()  # the store runs it in eval mode anyway
    store = open_features(pretrained(backbone), tokens, range(LAYERS + 1), same(config, dtype=dtype))
    assert backbone.training
    backbone.eval()
    for layer in range(LAYERS + 1):
        expect_equal(store, backbone, tokens, layer, tolerance)
    assert torch.equal(store.at(1).labels, tokens.labels)
    assert torch.equal(store.at(1).lengths, tokens.lengths)
    assert len(store.at(1)) == INPUTS


@pytest.mark.parametrize(
    ("build", "side"), [(modernbert, "right"), (llama, "left"), (llama, "right")], ids=["spans", "left", "right"]
)
def test_stored_batches_keep_the_token_data_of_each_family(
    config: StoreConfig, build: Callable[[], Backbone], side: str
) -> None:
    backbone, tokens = build(), split(side=side)
    store = open_features(pretrained(backbone), tokens, [0, 2], config)
    for layer in (0, 2):
        expect_equal(store, backbone, tokens, layer, 1e-5)


def test_upper_layers_resume_from_the_store(config: StoreConfig) -> None:
    backbone, tokens = bert(), split()
    batch = open_features(pretrained(backbone), tokens, [1], config).at(1).batch(range(INPUTS))
    assert batch.prefilled is not None
    with torch.no_grad():
        scores = backbone.classify(backbone.answers(backbone.run(batch.prefilled, LAYERS))[:, 0])
    assert_close(scores, batch.teacher_scores)


def test_reopening_a_store_writes_nothing_and_a_new_layer_writes_only_its_shards(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    open_features(model, tokens, [1], config)
    first = shard_files(config)
    assert len(first) == 2 * len(assign_shards(tokens.lengths.numpy(), SHARD))
    open_features(model, tokens, [1], config)
    assert shard_files(config) == first
    store = open_features(model, tokens, [1, 2], config)
    later = shard_files(config)
    assert {path: later[path] for path in first} == first
    assert {path.parent.name for path in set(later) - set(first)} == {"layer-002-float32"}
    expect_equal(store, model.backbone, tokens, 2, 1e-5)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def corrupt(path: Path) -> None:
    """Change one byte in the middle, but neither size nor time stamp."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(status.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


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
        with pytest.raises(UserError, match=r"cannot write .*shard-00000.*free some space.*what is complete is kept"):
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


def test_the_key_depends_on_everything_that_determines_the_features(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    keys = [open_features(model, tokens, [], config).key]
    keys.append(open_features(pretrained(bert(seed=1)), tokens, [], config).key)  # the identity names the same file
    with torch.no_grad():
        next(model.backbone.parameters()).view(-1)[0] += 1
    keys.append(open_features(model, tokens, [], config).key)
    activation = bert()
    activation.config.layer_norm_eps = 0.1
    keys.append(open_features(pretrained(activation), tokens, [], config).key)
    for other in (split(seed=1), split(max_length=8)):
        keys.append(open_features(pretrained(bert()), other, [], config).key)
    assert len(set(keys)) == len(keys)
    assert split().digest != split(side="left").digest
    assert open_features(pretrained(bert()), split(), [], config).key == keys[0]
    known = backbone_digest(pretrained(bert()).backbone)
    assert open_features(pretrained(bert()), split(), [], config, weights=known).key == keys[0]


def test_stores_of_several_dtypes_exist_side_by_side(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    keys = {open_features(model, tokens, [1], same(config, dtype=dtype)).key for dtype in ("float32", "bfloat16")}
    assert len(keys) == 1
    expect_equal(open_features(model, tokens, [1], config), model.backbone, tokens, 1, 1e-5)


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


def test_over_budget_only_the_teacher_is_stored(config: StoreConfig, caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = pretrained(bert()), split()
    layer_gb = int(tokens.lengths.sum()) * WIDTH * 4 / 1e9
    with caplog.at_level(logging.WARNING):
        store = open_features(model, tokens, [1, 2], same(config, budget_gb=1.5 * layer_gb))
    message = caplog.records[-1].getMessage()
    teacher_gb = INPUTS * (WIDTH + 3) * 4 / 1e9
    assert f"need {teacher_gb + 2 * layer_gb:.3g} GB, more than budget_gb = {1.5 * layer_gb:g};" in message
    assert store.stored_layers == ()
    assert {path.parent.name for path in shard_files(config)} == {"teacher"}
    batch, expected = store.at(2).batch([4, 0, 9]), OnlineFeatures(tokens, model.backbone).batch([4, 0, 9])
    assert batch.prefilled is None
    assert batch.tokens is not None
    assert expected.tokens is not None
    assert all(torch.equal(batch.tokens[name], expected.tokens[name]) for name in expected.tokens)
    assert_close(batch.teacher_vectors, expected.teacher_vectors)


def test_the_budget_includes_the_teacher(config: StoreConfig, caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = pretrained(bert()), split()
    with caplog.at_level(logging.WARNING):
        store = open_features(model, tokens, [1], same(config, budget_gb=1e-6))
    assert (
        "the teacher's outputs of 23 inputs need 3.22e-06 GB, more than budget_gb = 1e-06; storing nothing"
        in caplog.text
    )
    assert not store.has_teacher
    assert not Path(config.root, store.key).exists()
    for features in (store.at(1), store.with_tokens()):
        batch, expected = features.batch([4, 0, 9]), OnlineFeatures(tokens, model.backbone).batch([4, 0, 9])
        assert_close(batch.teacher_vectors, expected.teacher_vectors)
        assert_close(batch.teacher_scores, expected.teacher_scores)
    assert open_features(model, tokens, [1], config).has_teacher, "a larger budget stores it"


@pytest.mark.usefixtures("_no_settling")
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


def test_the_budget_counts_what_is_stored_already(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    assert open_features(model, tokens, [1], config).stored_layers == (1,)
    used = sum(path.stat().st_size for path in shard_files(config))
    store = open_features(model, tokens, [1, 2], same(config, budget_gb=1.2 * used / 1e9))
    assert store.stored_layers == (1,)
    assert store.at(2).batch([0]).tokens is not None
    expect_equal(store, model.backbone, tokens, 1, 1e-5)


def test_insufficient_disk_space_is_detected_before_writing(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Place, "free", lambda place: 4000)  # the teacher needs 3.2 kB
    assert open_features(pretrained(bert()), split(), [1], config).stored_layers == ()
    assert "more than the 4e-06 GB available on the disk" in caplog.text


def test_features_of_decoders_that_read_the_text_are_not_stored(
    config: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, tokens = bart(), split()
    store = open_features(pretrained(backbone), tokens, [1], config)
    assert "decoder" in caplog.text
    assert store.stored_layers == ()
    batch, expected = store.at(1).batch([4, 0, 9]), OnlineFeatures(tokens, backbone).batch([4, 0, 9])
    assert batch.tokens is not None
    assert_close(batch.teacher_scores, expected.teacher_scores)


def test_a_dtype_that_is_too_narrow_is_refused(config: StoreConfig) -> None:
    backbone = bert()
    with torch.no_grad():
        backbone.model.bert.encoder.layer[0].output.LayerNorm.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"float16 cannot hold the states of layer 1.*bfloat16 or float32"):
        open_features(pretrained(backbone), split(), [1], same(config, dtype="float16"))


def test_a_stale_store_is_refused(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone's code may change while its weights do not."""
    model, tokens = pretrained(bert()), split()
    key = open_features(model, tokens, [1], config).key
    run = Backbone.run

    def doubled(backbone: Backbone, state: HiddenState, to: int) -> HiddenState:
        return replace(state, hidden=2 * run(backbone, state, to).hidden, depth=to)

    monkeypatch.setattr(Backbone, "run", doubled)
    with pytest.raises(UserError, match=f"cache rm {key}"):
        open_features(model, tokens, [1], config)


def test_answers_that_depend_on_padding_are_refused(config: StoreConfig) -> None:
    with pytest.raises(UserError, match="depend on padding"):  # BERT reads its first token even if it is padding
        open_features(pretrained(bert()), split(side="left"), [1], config)


def test_precision_is_measured_and_recorded(config: StoreConfig) -> None:
    backbone, tokens = bert(), split()
    half, brain, exact = (
        measure_precision(backbone, tokens, range(INPUTS), 1, dtype, batch_size=5)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    )
    assert (exact.max_relative_error, exact.mean_relative_error, exact.changed) == (0, 0, 0)
    assert 0 < half.mean_relative_error < brain.mean_relative_error < 2**-8
    assert half.mean_relative_error <= half.max_relative_error < 2**-11
    assert (half.inputs, half.tokens) == (INPUTS, int(tokens.lengths.sum()))
    store = open_features(pretrained(backbone), tokens, [1], same(config, dtype="float16"))
    noted = store.precision(1)
    assert noted is not None
    assert asdict(noted) == approx(asdict(half))  # all shards together, each small enough to be measured whole
    assert f"  layer-001-float16: {noted}" in format_stores(list_stores(config.root))
    assert open_features(pretrained(backbone), tokens, [1], config).precision(1) is None


def test_a_root_may_be_a_uri(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    store = open_features(model, tokens, [1], same(config, root=Path(config.root).as_uri()))
    expect_equal(store, model.backbone, tokens, 1, 1e-5)
    files = shard_files(config)
    assert open_features(model, tokens, [1], config).key == store.key
    assert shard_files(config) == files


@pytest.fixture
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease.__init__, "__defaults__", (100.0, 0.0, 0.0, lambda seconds: None, lambda: 0.0))


@pytest.mark.usefixtures("_no_settling")
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


@pytest.mark.usefixtures("_no_settling")
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


@pytest.mark.usefixtures("_no_settling")
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
        with pytest.raises(UserError, match=r"was damaged and is removed; start again to write it again"):
            open_features(model, tokens, [1], remote, filesystem)
    expect_equal(open_features(model, tokens, [1], remote, filesystem), model.backbone, tokens, 1, 1e-5)
    after = shard_files(same(config, root=str(tmp_path / side)))
    assert after.keys() == files[side].keys()
    assert {path for path in after if after[path] != files[side][path]} == {damaged}


@pytest.mark.usefixtures("_no_settling")
@pytest.mark.parametrize("remote", [False, True])
def test_states_are_memory_mapped_rather_than_read(config: StoreConfig, tmp_path: Path, remote: bool) -> None:
    model, tokens = pretrained(bert()), split()
    filesystem = SubTreeFileSystem(str(tmp_path), LocalFileSystem()) if remote else None
    before = pa.total_allocated_bytes()
    store = open_features(model, tokens, [1], same(config, root="deep") if remote else config, filesystem)
    view: Any = store.at(1)
    views = view.states.ragged("hidden", np.arange(INPUTS))
    assert pa.total_allocated_bytes() == before
    assert sum(values.nbytes for values in views) == int(tokens.lengths.sum()) * WIDTH * 4


def resident_bytes(folder: str) -> int:
    """Return the memory of this process used by mapped files below a folder."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            inside = folder in rest
        elif inside and name == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="this system does not report resident memory")
def test_reading_keeps_little_memory_resident(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretrained(bert())
    texts = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(38)) for row in range(400)]
    tokens = TokenizedSplit(Dataset.from_dict({"text": texts, "label": [0] * len(texts)}), tokenizer(), 40)
    store = open_features(model, tokens, [1], same(config, shard_inputs=50))
    monkeypatch.setattr("revmux.features.pages.READ_AHEAD", 0)  # rows in their stored order
    stored = len(texts) * 40 * WIDTH * 4
    peaks = {}
    for limit in (stored // 8, 1000 * stored):
        monkeypatch.setattr("revmux.features.pages.RESIDENT_BYTES", limit)
        view = store.at(1)
        resident = []
        for start in range(0, len(texts), 10):
            view.batch(range(start, start + 10))
            resident.append(resident_bytes(config.root))
        peaks[limit] = max(resident)
        del view
    assert peaks[1000 * stored] > stored
    assert peaks[stored // 8] < stored // 2


class Clock:
    """A clock that advances only by sleeping."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.wake: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.wake()

    def now(self) -> float:
        return self.seconds


def test_a_lease_has_one_holder_and_expires_when_the_holder_dies() -> None:
    filesystem, clock = FileSystem.from_uri("mock:///")[0], Clock()
    first, second, third = (
        Lease(filesystem, "lease", lifetime=100, sleep=clock.sleep, now=clock.now) for _ in range(3)
    )
    assert first.acquire()
    assert not second.acquire(wait=False)
    clock.seconds += 90
    first.renew()
    clock.seconds += 90
    assert not second.acquire(wait=False)  # renewed in time
    clock.seconds += 20
    assert second.acquire(wait=False)  # the first holder has died
    first.release()
    assert not third.acquire(wait=False)  # the first holder cannot release it any more
    second.release()
    assert third.acquire(wait=False)


def test_a_process_that_loses_a_lease_race_waits() -> None:
    filesystem, clock = FileSystem.from_uri("mock:///")[0], Clock()
    winner, loser = (Lease(filesystem, "lease", sleep=clock.sleep, now=clock.now) for _ in range(2))
    steps = iter([winner._write, winner.release])
    clock.wake = lambda: next(steps, lambda: None)()
    assert loser.acquire()
    assert next(steps, None) is None


def test_a_lease_is_renewed_while_its_holder_works() -> None:
    filesystem = FileSystem.from_uri("mock:///")[0]
    lease = Lease(filesystem, "lease", lifetime=0.2, settle=0.0)
    assert lease.acquire()
    with lease.kept():
        first = lease._read()
        assert first is not None
        until = time.monotonic() + 30
        while (now := lease._read()) is None or now["renewed"] == first["renewed"]:
            assert time.monotonic() < until
        assert now["holder"] == lease.holder
    assert lease._read() is None


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


def test_stores_are_listed_and_removed(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command_line(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["revmux", *arguments])
        return main()

    model = pretrained(bert())
    small = open_features(model, split(), [], config)
    large = open_features(model, split(seed=1), [1, 2], config)
    bystander = Path(config.root) / "other"
    bystander.mkdir()
    stores = list_stores(config.root)
    assert [store.key for store in stores] == [large.key, small.key]
    assert stores[0].contents == ("layer-001-float32", "layer-002-float32", "teacher")
    assert stores[0].bytes == sum(path.stat().st_size for path in bystander.parent.joinpath(large.key).rglob("*.*"))
    assert command_line("cache", "ls", "--root", config.root) == 0
    assert capsys.readouterr().out == format_stores(stores) + "\n"
    assert command_line("cache", "rm", "zz", "--root", config.root) == 2
    for keys, problem in [([], "no store named"), (["zz"], "fits no store"), ([""], "fits"), (["other"], "fits no")]:
        with pytest.raises(UserError, match=problem):
            remove_stores(keys, config.root)
    assert [store.key for store in remove_stores([large.key[:8]], config.root)] == [large.key]
    assert [store.key for store in list_stores(config.root)] == [small.key]
    assert command_line("cache", "rm", "all", "--root", config.root) == 0
    assert list_stores(config.root) == []
    assert bystander.is_dir()
    assert list_stores(str(tmp_path / "nowhere")) == []


def test_a_store_that_is_being_written_is_not_removed(config: StoreConfig) -> None:
    key = open_features(pretrained(bert()), split(), [], config).key
    place = Place.open(config.root)
    with place.exclusive(f"{key}.lock"), pytest.raises(UserError, match="another process"):
        remove_stores([key], config.root)
    assert [store.key for store in list_stores(config.root)] == [key]


def test_a_layout_contains_every_input_once_and_respects_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revmux.features.shards.PART_TOKENS", 40)
    lengths = torch.randint(1, 30, (50,), generator=torch.Generator().manual_seed(0)).numpy()
    lengths[7] = 100  # longer than the maximum part
    layout = assign_shards(lengths, shard_inputs=6)
    assert [row for shard in range(len(layout)) for row in layout.rows(shard)] == list(range(50))
    assert all(len(layout.rows(shard)) <= 6 for shard in range(len(layout)))
    for shard in range(len(layout)):
        parts = layout.parts_of(shard)
        assert np.concatenate(parts).tolist() == list(layout.rows(shard))
        assert all(lengths[rows].sum() <= 40 or len(rows) == 1 for rows in parts)
        for rows in parts:
            (part,) = set(layout.find(rows).tolist())
            assert layout.shard_of(part) == shard


def test_large_stores_have_large_shards_and_small_ones_have_enough_for_all_workers() -> None:
    row = 4 * (384 + 2)  # the teacher of a MiniLM
    assert inputs_per_shard(5_000_000, row) * row >= 256 * 2**20
    assert inputs_per_shard(100_000, row) == 6_250
    assert inputs_per_shard(1_000, row) == 2_048


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'; known: float32, float16, bfloat16"),
        ({"budget_gb": -1}, "budget_gb is -1"),
        ({"budget_gb": float("nan")}, "budget_gb is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_inputs": 0}, "shard_inputs is 0"),
        ({"root": ""}, "root of the feature store is empty"),
        ({"copies": "s3://bucket/copies"}, "copies is 's3://bucket/copies'; name a folder of this machine"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        StoreConfig(**settings)


def test_the_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_root() == "/somewhere/revmux/features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == "~/.cache/revmux/features"


def test_wrong_requests_are_refused(config: StoreConfig) -> None:
    model, tokens = pretrained(bert()), split()
    with pytest.raises(UserError, match=f"prefill layer 9 does not exist; choose 0..{LAYERS}"):
        open_features(model, tokens, [9], config)
    with pytest.raises(UserError, match="layer 2 was not requested"):
        open_features(model, tokens, [], config).at(2)
    with pytest.raises(UserError, match="cannot open 'nosuch://"):
        open_features(model, tokens, [1], same(config, root="nosuch://bucket/x"))
    blocked = Path(config.root) / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        open_features(model, tokens, [1], same(config, root=str(blocked / "features")))
