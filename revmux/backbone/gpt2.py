"""GPT-2: learned positions added once, at the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from revmux.backbone.decoder import DecoderBackbone
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState


@register_backbone
class GPT2Backbone(DecoderBackbone):
    """``GPT2LMHeadModel`` or ``GPT2ForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)

    @property
    def core(self) -> Any:
        return self.model.transformer

    @property
    def final_norm(self) -> nn.Module:
        return self.core.ln_f

    @property
    def word_embeddings(self) -> nn.Module:
        return self.core.wte

    def place(self, state: HiddenState) -> HiddenState:
        hidden = self.core.drop(state.hidden + self.core.wpe(state.positions))  # (B, S, d)
        return replace(state, hidden=hidden, positions=None)

    def layer(self, index: int) -> nn.Module:
        return self.core.h[index]

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        masks, past = self.layer_masks(state), self.past_arguments(state)
        return lambda index: {"attention_mask": masks(index), **past}
