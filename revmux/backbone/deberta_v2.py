"""DeBERTa-v2 and v3: relative positions in every layer, and in some models a convolution after the first layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from revmux.backbone.base import Backbone, padding_mask, visibility
from revmux.backbone.positions import count_positions, distances, in_order
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState, TokenBatch


@register_backbone
class DebertaV2Backbone(Backbone):
    """``DebertaV2ForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("deberta-v2",)

    @property
    def readout_size(self) -> int:
        return int(self.model.pooler.output_dim)

    def embed(self, tokens: TokenBatch) -> HiddenState:
        mask = padding_mask(tokens)
        hidden = self.model.deberta.embeddings(
            input_ids=tokens["input_ids"], token_type_ids=tokens.get("token_type_ids"), mask=mask
        )  # (B, S, d), zero at padding
        cls = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return HiddenState(hidden=hidden, mask=mask, answer=cls, depth=0, positions=count_positions(hidden))

    def layer(self, index: int) -> nn.Module:
        encoder = self.model.deberta.encoder
        if index == 0 and encoder.conv is not None:
            return ConvolvedLayer(encoder.layer[0], encoder.conv)
        return encoder.layer[index]

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        encoder = self.model.deberta.encoder
        mask = visibility(state, state.hidden.dtype, "sdpa")  # the family takes bool masks: (B, 1, S, S)
        arguments: dict[str, Any] = {
            "attention_mask": encoder.get_attention_mask(state.mask) if mask is None else mask,
            "relative_pos": self._relative_positions(state),
            "rel_embeddings": encoder.get_rel_embedding(),
        }
        if encoder.conv is None:
            return lambda index: arguments
        segments = state.mask.long() if state.segments is None else state.segments
        return lambda index: arguments if index else {**arguments, "segments": segments}

    def _relative_positions(self, state: HiddenState) -> Tensor | None:
        encoder, positions = self.model.deberta.encoder, state.positions
        if not encoder.relative_attention or positions is None or in_order(positions):
            return encoder.get_rel_pos(state.hidden)  # (1, S, S), one table for all rows
        relative = distances(positions)  # (B, S, S)
        if encoder.position_buckets > 0 and encoder.max_relative_positions > 0:
            relative = make_log_bucket_position(relative, encoder.position_buckets, encoder.max_relative_positions)
        # The attention folds heads into the batch and broadcasts a leading 1, so each row needs its own copies.
        heads = self.config.num_attention_heads
        return relative.long().repeat_interleave(heads, dim=0).unsqueeze(0)  # (1, B·heads, S, S)

    def readout(self, answer: Tensor) -> Tensor:
        pooler = self.model.pooler
        return ACT2FN[self.config.pooler_hidden_act](pooler.dense(pooler.dropout(answer)))

    def score(self, vector: Tensor) -> Tensor:
        return self.model.classifier(self.model.dropout(vector))


class ConvolvedLayer(nn.Module):
    """The first layer with the convolution over its input, which the encoder adds to its output.

    Args:
        layer: the encoder's first layer.
        conv: the encoder's convolution.
    """

    def __init__(self, layer: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.conv = conv

    def forward(self, hidden: Tensor, segments: Tensor, **arguments: Any) -> Tensor:
        """(B, S, d) to (B, S, d); a token is convolved with its own segment's tokens alone.

        Args:
            hidden: embeddings.
            segments: (B, S) long, 0 for padding.
            arguments: what the layer takes.
        """
        output = self.layer(hidden, **arguments)[0]
        convolved = torch.zeros_like(output)
        for segment in range(1, int(segments.max()) + 1):
            own = (segments == segment).long()  # (B, S)
            convolved = convolved + self.conv(hidden * own.unsqueeze(-1), output, own)  # zero outside its segment
        return convolved
