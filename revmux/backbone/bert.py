"""BERT: embeddings, ``encoder.layer[i]``, CLS through the tanh pooler, a linear classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone.answer_layer import attend_from, gather_tokens, takes_dense_masks
from revmux.backbone.base import Backbone, bidirectional_mask, padding_mask
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState, TokenBatch


@register_backbone
class BertBackbone(Backbone):
    """``BertForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("bert",)

    def embed(self, tokens: TokenBatch) -> HiddenState:
        hidden = self.model.bert.embeddings(
            input_ids=tokens["input_ids"], token_type_ids=tokens.get("token_type_ids")
        )  # (B, S, d)
        cls = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return HiddenState(hidden=hidden, mask=padding_mask(tokens), answer=cls, depth=0)

    def layer(self, index: int) -> nn.Module:
        return self.model.bert.encoder.layer[index]

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        mask = bidirectional_mask(self.config, state)
        return lambda index: {"attention_mask": mask}

    def answer_layer(self, index: int, hidden: Tensor, places: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        if not takes_dense_masks(self.config):
            return None
        layer: Any = self.layer(index)
        own, heads = layer.attention.self, self.config.num_attention_heads
        read = attend_from(
            places, hidden, own.query, own.key, own.value, heads, arguments["attention_mask"]
        )  # (B, A, d)
        attended = layer.attention.output(read, gather_tokens(hidden, places))
        return layer.output(layer.intermediate(attended), attended)

    def readout(self, answer: Tensor) -> Tensor:
        pooler = self.model.bert.pooler
        return pooler.activation(pooler.dense(answer))

    def score(self, vector: Tensor) -> Tensor:
        return self.model.classifier(self.model.dropout(vector))
