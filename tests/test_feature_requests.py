"""Settings and requests that the feature store refuses, with the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import LAYERS, bert, pretrained, same, small_store, split

from revmux import UserError
from revmux.backbone import Backbone, HiddenState
from revmux.features.config import StoreConfig, default_root
from revmux.features.store import open_features

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


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


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'; known: float32, float16, bfloat16"),
        ({"budget_gb": -1}, "budget_gb is -1"),
        ({"budget_gb": float("nan")}, "budget_gb is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_inputs": 0}, "shard_inputs is 0"),
        ({"root": ""}, "root of the feature store is empty"),
        ({"copies": "s3://bucket/copies"}, "copies is 's3://bucket/copies'; name a folder on this machine"),
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
