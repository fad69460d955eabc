"""LLaMA and related models (Mistral, Qwen2, Qwen3): rotary positions in every layer, sliding windows in some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from revmux.backbone.decoder import DecoderBackbone
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState


@register_backbone
class LlamaBackbone(DecoderBackbone):
    """``LlamaForCausalLM`` or ``LlamaForSequenceClassification`` cut at any layer, and the same classes of related models."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")

    @property
    def core(self) -> Any:
        return self.model.model

    @property
    def final_norm(self) -> nn.Module:
        return self.core.norm

    @property
    def word_embeddings(self) -> nn.Module:
        return self.core.embed_tokens

    def window(self, index: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def layer(self, index: int) -> nn.Module:
        return self.core.layers[index]

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        masks, past = self.layer_masks(state), self.past_arguments(state)
        rotary = self.core.rotary_emb(state.hidden, position_ids=state.positions)
        return lambda index: {
            "attention_mask": masks(index),
            "position_embeddings": rotary,
            "position_ids": state.positions,
            **past,
        }
