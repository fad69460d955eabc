"""What the feature store stores when its budget, the disk or the family does not allow all of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from feature_stores import INPUTS, WIDTH, bart, bert, expect_equal, pretrained, same, shard_files, small_store, split
from numeric import assert_close

from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.utils.place import Place

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


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
    assert "more than the 4e-06 GB available on disk" in caplog.text


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
