"""The last layer of an encoder for its answer positions only, since nothing reads the other tokens' states there.

Keys and values still come from every token. Queries, the attention output and the feed-forward part, about five sixths
of a layer's work, are computed for the answers only. It is the same function with different rounding: training uses
it, and inference runs the model's own layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revmux.backbone.state import HiddenState


def gather_tokens(hidden: Tensor, places: Tensor) -> Tensor:
    """The states at the given positions: (B, S, d) at (B, A) to (B, A, d)."""
    return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def attend_from(
    places: Tensor, hidden: Tensor, query: nn.Module, key: nn.Module, value: nn.Module, heads: int, mask: Tensor | None
) -> Tensor:
    """Self-attention from some tokens to all tokens, before the output projection.

    Args:
        places: (B, A) long, positions of the queries.
        hidden: (B, S, d), input of the layer.
        query: query projection of the layer.
        key: key projection.
        value: value projection.
        heads: number of heads, H.
        mask: (B or 1, 1, S or 1, S), bool or additive, or None if every token attends to every token.

    Returns:
        (B, A, d).
    """

    def by_head(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, A or S, d/H)

    if mask is not None and mask.shape[2] > 1:
        rows = places[:, None, :, None].expand(-1, -1, -1, mask.shape[-1])  # (B, 1, A, S)
        mask = mask.expand(len(hidden), -1, -1, -1).gather(2, rows)  # (B, 1, A, S)
    asked = by_head(query(gather_tokens(hidden, places)))
    read = F.scaled_dot_product_attention(asked, by_head(key(hidden)), by_head(value(hidden)), mask)  # (B, H, A, d/H)
    return read.transpose(1, 2).flatten(2)


def takes_dense_masks(config: Any) -> bool:
    """Whether the model uses an attention implementation whose masks :func:`attend_from` supports."""
    return config._attn_implementation in ("sdpa", "eager")


def answers_only(hidden: Tensor, depth: int) -> HiddenState:
    """A state whose only tokens are the answers.

    Args:
        hidden: (B, A, d), the answers.
        depth: depth of the answers.
    """
    places = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])  # (B, A)
    return HiddenState(hidden=hidden, mask=torch.ones_like(places, dtype=torch.bool), answer=places, depth=depth)
