"""A soft prompt: trainable vectors in front of every input's word embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revmux.backbone.state import insert_before


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
        prompt = self.vectors.to(hidden.dtype).expand(len(hidden), -1, -1)  # (B, P, d)
        hidden = torch.cat([prompt, hidden], dim=1)  # (B, P + S, d)
        source, mask = insert_before(mask, len(self))
        return hidden.gather(1, source.unsqueeze(-1).expand_as(hidden)), mask
