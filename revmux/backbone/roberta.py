"""RoBERTa: BERT's layers; positions counted after the padding index; CLS through its own head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone.base import padding_mask
from revmux.backbone.bert import BertBackbone
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState, TokenBatch


@register_backbone
class RobertaBackbone(BertBackbone):
    """``RobertaForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("roberta",)

    @property
    def max_length(self) -> int:
        # Positions start after the padding index, so the table is longer than any input.
        return int(self.config.max_position_embeddings) - int(self.config.pad_token_id) - 1

    def embed(self, tokens: TokenBatch) -> HiddenState:
        hidden = self.model.roberta.embeddings(
            input_ids=tokens["input_ids"], token_type_ids=tokens.get("token_type_ids")
        )  # (B, S, d)
        cls = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return HiddenState(hidden=hidden, mask=padding_mask(tokens), answer=cls, depth=0)

    def layer(self, index: int) -> nn.Module:
        return self.model.roberta.encoder.layer[index]

    def readout(self, answer: Tensor) -> Tensor:
        head = self.model.classifier
        return torch.tanh(head.dense(head.dropout(answer)))

    def score(self, vector: Tensor) -> Tensor:
        head = self.model.classifier
        return head.out_proj(head.dropout(vector))
