"""Exit head: a trained head at layer e of the same frozen backbone, with N = 1. It is the baseline without multiplexing.

It costs e of L layers. One tanh layer reads the state at the answer position and a mean over the input's tokens, which
makes the baseline strong at negligible cost. With LoRA, layers l+1..e are adapted to the exit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState
from revmux.methods.attention_pooling import AttentionPooling
from revmux.methods.base import BackboneShape
from revmux.methods.early_exit import EarlyExit
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class ExitHeadOptions:
    """Settings of the exit head.

    Args:
        layer: e, the layer whose states the head reads, from 0 (embeddings) to L.
        dropout: dropout before the classifier in training.
        attention_pooling: whether the mean over the tokens is weighted by a learned attention, which starts uniform.
        lora_rank: rank of the low-rank updates of layers l+1..e. 0 means none.
    """

    layer: int = 1
    dropout: float = 0.1
    attention_pooling: bool = False
    lora_rank: int = 0


@register_method
class ExitHead(EarlyExit):
    """A trained head on [answer state ; mean state] at layer e."""

    name: ClassVar[str] = "exit-head"
    title: ClassVar[str] = "exit head"
    marks: ClassVar[tuple[str, str]] = ("s", "square")
    Options: ClassVar[type] = ExitHeadOptions
    matches_teacher: ClassVar[bool] = False

    def __init__(self, shape: BackboneShape, num_inputs: int = 1, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        width = shape.hidden_size
        self.dense = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(self.options.dropout)
        self.classifier = nn.Linear(width, shape.num_labels)
        self.attention = AttentionPooling(width) if self.options.attention_pooling else None

    @classmethod
    def describe(cls, num_inputs: int, prefill_layers: int) -> str:
        return f"an exit head at layer {prefill_layers}"

    def read(self, backbone: Backbone, state: HiddenState) -> Tensor:
        if self.attention is None:
            return backbone.own_states(state).unsqueeze(1)  # (B, 1, 2d)
        return self.attention.own_states(backbone, state).unsqueeze(1)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return answers

    def vector(self, backbone: Backbone, answer: Tensor) -> Tensor:
        return torch.tanh(self.dense(answer))  # (B, 1, d)

    def score(self, backbone: Backbone, vector: Tensor) -> Tensor:
        return self.classifier(self.dropout(vector))
