"""A Transformer layer for methods that mix by attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward layer of width 4d, each followed by a residual connection and LayerNorm (BERT).

    Args:
        hidden: d.
        heads: number of attention heads; must divide d.
        dropout: dropout after both sublayers in training.
    """

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, 4 * hidden)
        self.outer = nn.Linear(4 * hidden, hidden)
        self.output_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """Apply the layer: (B, S, d) to (B, S, d).

        Args:
            hidden: (B, S, d).
            visible: (B, S, S) bool, True where a row attends to a column. Every row attends to at least one column.
        """
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, S, d/H)
            for project in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1))  # (B, H, S, d/H)
        context = context.transpose(1, 2).flatten(2)  # (B, S, d)
        hidden = self.attention_norm(hidden + self.dropout(self.output(context)))
        return self.output_norm(hidden + self.dropout(self.outer(F.gelu(self.inner(hidden)))))
