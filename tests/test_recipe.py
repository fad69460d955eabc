"""A recipe's settings are applied to the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from torch import Tensor

import revmux.training.recipe
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.pretrained import Pretrained
from revmux.training import kept_backbone
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import load_backbone, prepare, train_here

pytestmark = pytest.mark.numeric


def test_gradient_checkpointing_recomputes_upper_layers_and_trains_the_same_weights(
    tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    passes, weights = [], []
    for checkpointing in (False, True):
        recipe = Recipe(
            BackboneConfig(str(tiny_model_folder), max_length=16),
            DataConfig(str(tiny_csv)),
            MethodConfig(num_inputs=2, prefill_layers=1),
            OptimConfig(epochs=1, batch_size=16, gradient_checkpointing=checkpointing),
            store=StoreConfig(root=str(tmp_path / "store")),
            shuffles=1,
        )
        prepared = prepare(recipe, load_task(recipe.data))
        with_gradient = []
        upper = prepared.model.backbone.layer(1), prepared.model.backbone.layer(2).attention.self.key
        for part in upper:  # training runs only the needed parts of the last layer
            part.register_forward_pre_hook(
                lambda *_, seen=with_gradient: seen.append(1) if torch.is_grad_enabled() else None
            )
        train_here(prepared)
        passes.append(len(with_gradient))
        weights.append(prepared.model.method.state_dict())
    assert passes[0] > 0
    assert passes[1] == 2 * passes[0], "once in the forward and once in the backward pass"
    for name, value in weights[0].items():
        assert_close(weights[1][name], value, layers=50)  # one epoch of steps


def test_runs_of_one_process_share_the_frozen_backbone_and_train_the_same_weights(
    tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Recipe] = []

    def load(recipe: Recipe, *more: Any) -> Pretrained:
        loaded.append(recipe)
        return load_backbone(recipe, *more)

    def train(keep: bool, **method: Any) -> dict[str, Tensor]:
        recipe = Recipe(
            BackboneConfig(str(tiny_model_folder), max_length=16),
            DataConfig(str(tiny_csv)),
            MethodConfig(prefill_layers=1, **method),
            OptimConfig(epochs=1, batch_size=16),
            store=StoreConfig(root=str(tmp_path / "store")),
            shuffles=1,
        )
        prepared = prepare(recipe, load_task(recipe.data), keep=keep)
        train_here(prepared)
        return prepared.model.method.state_dict()

    monkeypatch.setattr(revmux.training.recipe, "load_backbone", load)
    monkeypatch.setattr(kept_backbone, "_kept", {})  # another test of this process may have kept one
    alone = train(keep=False, num_inputs=2)
    for before in ({"num_inputs": 4}, {"name": "exit-head", "num_inputs": 1, "options": {"layer": 3, "lora_rank": 2}}):
        train(keep=True, **before)
        found = train(keep=True, num_inputs=2)
        assert all(torch.equal(value, alone[name]) for name, value in found.items())
    assert len(loaded) == 2, "one without and one with keep"
    train(keep=True, num_inputs=2, options={"tune_backbone": True})
    assert len(loaded) == 2, "a run that tunes the backbone takes the kept one"
    found = train(keep=True, num_inputs=2)
    assert len(loaded) == 3, "and the next one loads it again"
    assert all(torch.equal(value, alone[name]) for name, value in found.items())
