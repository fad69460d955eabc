"""Trainers of RevMUX on the tiny model, and which weights they change."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from revmux import BackboneShape, MultiplexedClassifier, build_method
from revmux.data.tokens import TokenizedSplit
from revmux.features.online import OnlineFeatures
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.trainer import Trainer

FAST = OptimConfig(epochs=4, batch_size=16, learning_rate=5e-3)


def split(pretrained: Pretrained, rows: list[dict[str, str]], with_teacher: bool = True) -> OnlineFeatures:
    names = pretrained.backbone.label_names
    data = Dataset.from_list([row | {"label": names.index(row["label"])} for row in rows])
    return OnlineFeatures(TokenizedSplit(data, pretrained.tokenizer, 16), pretrained.backbone, with_teacher)


def trainer(
    pretrained: Pretrained,
    rows: list[dict[str, str]],
    optim: OptimConfig = FAST,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """RevMUX with dropout, N = 2, l = 1, on 64 rows; 16 more rows are the selection split."""
    torch.manual_seed(seed)
    method = build_method(
        "revmux", BackboneShape.of(pretrained.backbone), 2, options or {"dropout": 0.1, "own_state": "linear"}
    )
    model = MultiplexedClassifier(pretrained.backbone, method, 1)
    train, selection = split(pretrained, rows[:64]), split(pretrained, rows[64:])
    return Trainer(model, train, selection, optim, LossConfig(), **arguments)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}
