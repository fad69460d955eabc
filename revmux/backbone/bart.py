"""BART: learned positions with an offset and a norm on the embeddings, none after the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from revmux.backbone.base import bidirectional_mask
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState


@register_backbone
class BartBackbone(EncoderDecoderBackbone):
    """``BartForSequenceClassification`` or ``BartForConditionalGeneration`` cut at any encoder layer."""

    model_types: ClassVar[tuple[str, ...]] = ("bart",)
    layers_read_positions: ClassVar[bool] = False

    @property
    def encoder(self) -> Any:
        return self.model.model.encoder

    @property
    def decoder(self) -> Any:
        return self.model.model.decoder

    @property
    def output_bias(self) -> Tensor | None:
        return self.model.final_logits_bias[0]

    def decoder_layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def layer(self, index: int) -> nn.Module:
        return self.encoder.layers[index]

    def place(self, stack: Any, words: Tensor, positions: Tensor) -> Tensor:
        table = stack.embed_positions
        hidden = stack.layernorm_embedding(words + nn.functional.embedding(positions + table.offset, table.weight))
        return nn.functional.dropout(hidden, p=stack.dropout, training=stack.training)  # (B, S, d)

    def finish(self, stack: Any, hidden: Tensor) -> Tensor:
        return hidden

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        mask = bidirectional_mask(self.encoder.config, state)
        return lambda index: {"attention_mask": mask}

    def decoder_arguments(self, stream: HiddenState, memory: HiddenState) -> dict[str, Any]:
        return self.stream_masks(stream, memory)
