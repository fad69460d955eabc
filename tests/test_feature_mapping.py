"""Shards on disk and in memory: their layout, and how little of what is read stays resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from feature_stores import INPUTS, WIDTH, bert, no_settling, pretrained, same, small_store, split, tokenizer
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from tiny_models import WORDS

from revmux.data.tokens import TokenizedSplit
from revmux.features.config import StoreConfig
from revmux.features.shards import assign_shards, inputs_per_shard
from revmux.features.store import open_features

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    no_settling(monkeypatch)


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
