"""T5: relative positions that block 0 computes for all blocks, a final norm on both stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from revmux.backbone.base import bidirectional_mask
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.backbone.positions import count_positions, distances, in_order
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState

TRAINED_LENGTH = 512  # tokens; relative positions themselves are unbounded


@register_backbone
class T5Backbone(EncoderDecoderBackbone):
    """``T5ForConditionalGeneration`` or ``T5ForSequenceClassification`` cut at any encoder block."""

    model_types: ClassVar[tuple[str, ...]] = ("t5",)
    layers_read_positions: ClassVar[bool] = True

    @property
    def _stacks(self) -> Any:
        return self.model if self.verbalizer is not None else self.model.transformer

    @property
    def encoder(self) -> Any:
        return self._stacks.encoder

    @property
    def decoder(self) -> Any:
        return self._stacks.decoder

    @property
    def position_limit(self) -> int:
        return int(getattr(self.config, "n_positions", TRAINED_LENGTH))

    def decoder_layers(self) -> nn.ModuleList:
        return self.decoder.block

    def layer(self, index: int) -> nn.Module:
        return self.encoder.block[index]

    def place(self, stack: Any, words: Tensor, positions: Tensor) -> Tensor:
        return stack.dropout(words)

    def finish(self, stack: Any, hidden: Tensor) -> Tensor:
        return stack.dropout(stack.final_layer_norm(hidden))

    def normalize(self, hidden: Tensor) -> Tensor:
        normalized: Tensor = self.encoder.final_layer_norm(hidden)
        return normalized

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        mask = bidirectional_mask(self.encoder.config, state)
        bias = relative_bias(self.encoder, state)
        return lambda index: {"attention_mask": mask, "position_bias": bias}

    def decoder_arguments(self, stream: HiddenState, memory: HiddenState) -> dict[str, Any]:
        bias = relative_bias(self.decoder, stream)
        return {
            **self.stream_masks(stream, memory),
            "position_bias": bias,
            # Cross-attention has no position bias.
            "encoder_decoder_position_bias": bias.new_zeros(
                1, bias.shape[1], stream.hidden.shape[1], memory.hidden.shape[1]
            ),
        }

    def readout(self, answer: Tensor) -> Tensor:
        # Where T5 shares its input and output embeddings it scales the state down before scoring.
        scaled = getattr(self.config, "scale_decoder_outputs", self.config.tie_word_embeddings)
        if self.verbalizer is not None and scaled:
            return answer * self.hidden_size**-0.5
        return super().readout(answer)


def relative_bias(stack: Any, state: HiddenState) -> Tensor:
    """The position bias that every block of a stack adds to its attention scores.

    Args:
        stack: encoder or decoder; its block 0 holds the bias table.
        state: (B, S, d), at any depth.

    Returns:
        (1 or B, heads, S, S); one for all rows where positions are 0..S-1 in every row.
    """
    attention = stack.block[0].layer[0].SelfAttention
    positions = count_positions(state.hidden) if state.positions is None else state.positions
    if in_order(positions):
        length = positions.shape[1]
        return attention.compute_bias(length, length, device=positions.device)
    buckets = attention._relative_position_bucket(
        -distances(positions),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )  # (B, S, S)
    return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
