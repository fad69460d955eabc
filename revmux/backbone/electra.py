"""ELECTRA: BERT's layers on embeddings projected to the hidden size; CLS through its own GELU head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone.base import padding_mask
from revmux.backbone.bert import BertBackbone
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState, TokenBatch


@register_backbone
class ElectraBackbone(BertBackbone):
    """``ElectraForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("electra",)

    def embed(self, tokens: TokenBatch) -> HiddenState:
        electra = self.model.electra
        hidden = electra.embeddings(
            input_ids=tokens["input_ids"], token_type_ids=tokens.get("token_type_ids")
        )  # (B, S, embedding_size)
        if hasattr(electra, "embeddings_project"):  # absent where embedding_size = d
            hidden = electra.embeddings_project(hidden)  # (B, S, d)
        cls = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return HiddenState(hidden=hidden, mask=padding_mask(tokens), answer=cls, depth=0)

    def layer(self, index: int) -> nn.Module:
        return self.model.electra.encoder.layer[index]

    def readout(self, answer: Tensor) -> Tensor:
        head = self.model.classifier
        return head.activation(head.dense(head.dropout(answer)))

    def score(self, vector: Tensor) -> Tensor:
        head = self.model.classifier
        return head.out_proj(head.dropout(vector))
