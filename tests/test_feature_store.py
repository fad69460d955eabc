"""The feature store returns what the backbone computes, and reuses what is stored already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from feature_stores import (
    INPUTS,
    LAYERS,
    SHARD,
    bert,
    expect_equal,
    llama,
    modernbert,
    pretrained,
    same,
    shard_files,
    small_store,
    split,
)
from numeric import approx, assert_close

from revmux.backbone import Backbone
from revmux.features.cache_cli import format_stores, list_stores
from revmux.features.config import StoreConfig
from revmux.features.key import backbone_digest
from revmux.features.precision import measure_precision
from revmux.features.shards import assign_shards
from revmux.features.store import open_features

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


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
