"""A soft prompt: trainable vectors in front of every input's word embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """P vectors in front of every input.

    Args:
        vectors: (P, d) initial values, kept in float32 whatever the backbone's data type, so that small updates are not lost.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().float().clone())

    def __len__(self) -> int:
        return len(self.vectors)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Insert the vectors directly before each input's first token, after any padding on the left.

        Args:
            hidden: (B, S, d) word embeddings.
            mask: (B, S) bool.

        Returns:
            (B, P + S, d) and (B, P + S).
        """
        rows, length = mask.shape
        prompt = self.vectors.to(hidden.dtype).expand(rows, -1, -1)  # (B, P, d)
        hidden = torch.cat([prompt, hidden], dim=1)  # (B, P + S, d)
        mask = torch.cat([mask.new_ones(rows, len(self)), mask], dim=1)
        padding = mask[:, len(self) :].int().argmax(dim=1, keepdim=True)  # (B, 1) padding on the left
        place = torch.arange(len(self) + length, device=mask.device).expand(rows, -1)
        source = torch.where(place < padding, place + len(self), place - padding)
        source = torch.where(place < padding + len(self), source, place)  # (B, P + S)
        return hidden.gather(1, source.unsqueeze(-1).expand_as(hidden)), mask.gather(1, source)
