"""DistilBERT: ``transformer.layer[i]``, CLS through ``pre_classifier`` and a ReLU, a linear classifier."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone.answer_layer import attend_from, gather_tokens, takes_dense_masks
from revmux.backbone.base import padding_mask
from revmux.backbone.bert import BertBackbone
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState, TokenBatch


@register_backbone
class DistilBertBackbone(BertBackbone):
    """``DistilBertForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("distilbert",)

    def embed(self, tokens: TokenBatch) -> HiddenState:
        hidden = self.model.distilbert.embeddings(tokens["input_ids"])  # (B, S, d); the family has no token types
        cls = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return HiddenState(hidden=hidden, mask=padding_mask(tokens), answer=cls, depth=0)

    def layer(self, index: int) -> nn.Module:
        return self.model.distilbert.transformer.layer[index]

    def answer_layer(self, index: int, hidden: Tensor, places: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        if not takes_dense_masks(self.config):
            return None
        layer: Any = self.layer(index)
        own, heads = layer.attention, self.config.num_attention_heads
        read = attend_from(
            places, hidden, own.q_lin, own.k_lin, own.v_lin, heads, arguments["attention_mask"]
        )  # (B, A, d)
        attended = layer.sa_layer_norm(own.out_lin(read) + gather_tokens(hidden, places))
        return layer.output_layer_norm(layer.ffn(attended) + attended)

    def readout(self, answer: Tensor) -> Tensor:
        return torch.relu(self.model.pre_classifier(answer))

    def score(self, vector: Tensor) -> Tensor:
        return self.model.classifier(self.model.dropout(vector))
