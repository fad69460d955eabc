"""Stored tokens: they equal those in memory, are written once, and are read without the texts."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.content import content_digest
from revmux.data.prompt import Prompt
from revmux.data.task import TaskData, load_task
from revmux.data.tokens import TokenizedSplit
from revmux.features import shards, tokens
from revmux.features.cache_cli import list_stores
from revmux.features.config import StoreConfig
from revmux.features.tokens import StoredTokens, store_tokens, tokenize_task
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import prepare, train_here
from revmux.utils.lease import Lease

LENGTH = 12


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(root=str(tmp_path / "store"), copies=str(tmp_path / "copies"), dtype="float32")


@pytest.fixture
def rows(tiny_rows: list[dict[str, str]]) -> Dataset:
    texts = [row["text"] for row in tiny_rows]
    return Dataset.from_dict({"text": texts, "text_pair": texts[::-1], "label": [row % 3 for row in range(len(texts))]})


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per part, several parts per shard, and several shards."""
    monkeypatch.setattr("revmux.data.tokens.TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(tokens, "PART_BLOCKS", 2)
    monkeypatch.setattr(tokens, "SHARD_BYTES", 4_000)


def expect_equal(stored: StoredTokens, memory: TokenizedSplit) -> None:
    assert torch.equal(stored.labels.long(), memory.labels)
    assert torch.equal(stored.lengths.long(), memory.lengths)
    assert (len(stored), stored.truncated, stored.digest) == (len(memory), memory.truncated, memory.digest)
    for picked in ([0], [len(memory) - 1, 3, 3, 0], torch.randperm(len(memory))):
        one, other = stored.batch(picked), memory.batch(picked)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def files_in(config: StoreConfig) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(config.root).rglob("*.*") if path.suffix != ".lock"}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("prompt", [None, Prompt("own", "w1 {text} w2", pair_template="w3 {text} w4 {text_pair}")])
@pytest.mark.parametrize("pairs", [True, False])
def test_stored_tokens_equal_those_in_memory(
    rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig, pairs: bool, prompt: Prompt | None
) -> None:
    split = rows if pairs else rows.remove_columns("text_pair")
    stored = store_tokens(split, tiny_pretrained.tokenizer, LENGTH, prompt, config)
    expect_equal(stored, TokenizedSplit(split, tiny_pretrained.tokenizer, LENGTH, prompt))
    files = files_in(config)
    assert sum(path.parent.name == "tokens" for path in files) > 2
    expect_equal(
        store_tokens(split, tiny_pretrained.tokenizer, LENGTH, prompt, config),
        TokenizedSplit(split, tiny_pretrained.tokenizer, LENGTH, prompt),
    )
    assert files_in(config) == files, "tokens that are stored are not written again"


def test_the_key_depends_on_everything_that_determines_the_tokens(
    rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig
) -> None:
    tokenizer = tiny_pretrained.tokenizer
    prompt = Prompt("one", "w1 {text}", pair_template="{text} {text_pair}")

    def key(split: Dataset = rows, length: int = LENGTH, prompt: Prompt | None = None) -> str:
        return store_tokens(split, tokenizer, length, prompt, config).key

    reversed_rows = rows.select(range(len(rows) - 1, -1, -1))
    relabelled = rows.remove_columns("label").add_column("label", [0] * len(rows))
    keys = [key(), key(length=8), key(prompt=prompt), key(reversed_rows), key(relabelled)]
    keys.append(key(rows.remove_columns("text_pair")))
    assert len(set(keys)) == len(keys)
    assert key(prompt=replace(prompt, name="another name")) == keys[2]
    tokenizer(["w1"], truncation=True, max_length=3)  # changes the state of the tokenizer, not its rules
    assert key(concatenate_datasets([rows.select(range(9)), rows.select(range(9, len(rows)))])) == keys[0]


def test_the_content_hash_depends_on_the_rows_and_not_on_their_storage(rows: Dataset) -> None:
    table = pa.table({"label": pa.array(rows["label"], pa.int32()), "text": pa.array(rows["text"], pa.large_string())})
    narrow = Dataset.from_dict({"text": rows["text"], "label": rows["label"]})
    assert content_digest(Dataset(table)) == content_digest(narrow)
    assert content_digest(narrow.select(range(80)).shuffle(seed=0)) != content_digest(narrow)
    one, other = (Dataset.from_dict({"text": texts}) for texts in (["ab", "c"], ["a", "bc"]))
    assert content_digest(one) != content_digest(other)


def store_at(config: StoreConfig, pretrained: Pretrained, split: dict[str, list[Any]], log: str, barrier: Any) -> None:
    write = tokens._write

    def noted(*arguments: Any) -> dict[str, Any]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return write(*arguments)

    barrier.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_write", noted)
        store_tokens(Dataset.from_dict(split), pretrained.tokenizer, LENGTH, None, config)


def test_one_process_tokenizes_while_others_wait(
    rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    log, barrier = tmp_path / "log", context.Barrier(2)
    arguments = (config, tiny_pretrained, rows.to_dict(), str(log), barrier)
    other = context.Process(target=store_at, args=arguments)
    other.start()
    store_at(*arguments)
    other.join()
    assert other.exitcode == 0
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.usefixtures("small_parts")
def test_a_killed_writer_leaves_nothing_that_is_read(
    rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, add, parts = tiny_pretrained.tokenizer, shards.ShardWriter.add, []

    def killed(writer: shards.ShardWriter, columns: Any) -> None:
        parts.append(writer)
        if len(parts) == 6:
            raise KeyboardInterrupt
        add(writer, columns)

    monkeypatch.setattr(shards.ShardWriter, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        store_tokens(rows, tokenizer, LENGTH, None, config)
    monkeypatch.undo()
    assert list_stores(config.root) == []
    expect_equal(store_tokens(rows, tokenizer, LENGTH, None, config), TokenizedSplit(rows, tokenizer, LENGTH))
    assert not [path for path in files_in(config) if path.suffix == ".tmp"]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("damaged", ["tokens", "labels"])
def test_damaged_files_are_refused_and_written_again(
    rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig, damaged: str
) -> None:
    stored = store_tokens(rows, tiny_pretrained.tokenizer, LENGTH, None, config)
    path = next(path for path in files_in(config) if damaged in str(path.relative_to(config.root)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged"):
        store_tokens(rows, tiny_pretrained.tokenizer, LENGTH, None, config).batch(range(len(rows)))
    again = store_tokens(rows, tiny_pretrained.tokenizer, LENGTH, None, config)
    assert again.key == stored.key
    expect_equal(again, TokenizedSplit(rows, tiny_pretrained.tokenizer, LENGTH))


@pytest.mark.usefixtures("small_parts")
def test_a_worker_copies_only_the_shards_that_it_reads(
    rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease.__init__, "__defaults__", (100.0, 0.0, 0.0, lambda seconds: None, lambda: 0.0))
    filesystem, remote = SubTreeFileSystem(str(tmp_path), LocalFileSystem()), replace(config, root="deep/store")
    stored = store_tokens(rows, tiny_pretrained.tokenizer, LENGTH, None, remote, filesystem=filesystem)

    def copied() -> list[str]:
        return sorted(path.name.partition(".")[0] for path in Path(config.copies).rglob("*.*"))

    assert copied() == ["labels", "lengths", "meta"]
    stored.batch([0, 1])
    assert copied() == ["labels", "lengths", "meta", "shard-00000"]
    expect_equal(stored, TokenizedSplit(rows, tiny_pretrained.tokenizer, LENGTH))


def test_a_pickled_split_is_a_location(rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig) -> None:
    many = concatenate_datasets([rows] * 40)
    stored = store_tokens(many, tiny_pretrained.tokenizer, LENGTH, None, config)
    assert len(pickle.dumps(stored)) < len(pickle.dumps(tiny_pretrained.tokenizer)) + 1_000
    expect_equal(pickle.loads(pickle.dumps(stored)), TokenizedSplit(many, tiny_pretrained.tokenizer, LENGTH))  # noqa: S301


def test_training_on_stored_tokens_gives_the_same_weights_and_reads_no_texts(
    tiny_csv: Path, tiny_model_folder: Path, config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        BackboneConfig(str(tiny_model_folder), max_length=16),
        DataConfig(source=str(tiny_csv)),
        MethodConfig("revmux", 2, 1),
        OptimConfig(epochs=2, batch_size=8),
        store=config,
        shuffles=2,
    )
    task: TaskData = load_task(recipe.data)
    expected = train_here(prepare(recipe, task))
    stored = tokenize_task(task, recipe.backbone, recipe.store)
    read: Callable[..., Any] = Dataset.iter
    monkeypatch.setattr(Dataset, "iter", lambda *_, **__: pytest.fail("a text was read"))
    found = train_here(prepare(recipe, stored))
    monkeypatch.setattr(Dataset, "iter", read)
    assert found == expected
    assert {info.contents for info in list_stores(config.root)} == {("tokens",), ("layer-001-float32", "teacher")}


def test_a_method_that_tunes_the_backbone_needs_room_for_its_teacher(
    tiny_csv: Path, tiny_model_folder: Path, config: StoreConfig
) -> None:
    data, backbone = DataConfig(source=str(tiny_csv)), BackboneConfig(str(tiny_model_folder), max_length=16)
    method = MethodConfig("revmux", 2, 1, {"tune_backbone": True})
    recipe = Recipe(backbone, data, method, OptimConfig(), store=replace(config, budget_gb=0))
    with pytest.raises(UserError, match="revmux tunes the backbone, so its teacher must be stored"):
        prepare(recipe, load_task(data))
    assert train_here(prepare(replace(recipe, method=MethodConfig("revmux", 2, 1)), load_task(data))).accuracies


def test_a_task_can_be_sent_without_the_texts_that_train(tiny_csv: Path) -> None:
    task = load_task(DataConfig(source=str(tiny_csv)))
    sent = task.with_test_only()
    assert (len(sent.train), len(sent.selection)) == (0, 0)
    assert sent.test[:] == task.test[:]
    assert (sent.is_pair, sent.identity) == (task.is_pair, task.identity)


def test_an_empty_split_is_refused(tiny_pretrained: Pretrained, config: StoreConfig) -> None:
    with pytest.raises(UserError, match="the split is empty"):
        store_tokens(Dataset.from_dict({"text": [], "label": []}), tiny_pretrained.tokenizer, LENGTH, None, config)


def test_missing_tokens_are_reported(tiny_pretrained: Pretrained, config: StoreConfig) -> None:
    with pytest.raises(UserError, match="contains no complete tokens; start again"):
        tokens.open_tokens("nosuchkey", tiny_pretrained.tokenizer, config)


def test_numbers_of_a_shard_are_mapped(rows: Dataset, tiny_pretrained: Pretrained, config: StoreConfig) -> None:
    before = pa.total_allocated_bytes()
    stored = store_tokens(rows, tiny_pretrained.tokenizer, LENGTH, None, config)
    columns = stored._columns
    views = columns.ragged("input_ids", np.arange(len(rows)))
    assert pa.total_allocated_bytes() == before
    assert views[0].dtype == np.uint16
