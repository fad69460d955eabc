"""Token positions, for families that use them in every layer (rotary, relative)."""

from __future__ import annotations

import torch
from torch import Tensor


def count_positions(hidden: Tensor) -> Tensor:
    """The positions 0..S-1 of a plain input.

    Args:
        hidden: (B, S, d).

    Returns:
        (B, S) long.
    """
    return torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])


def in_order(positions: Tensor) -> bool:
    """Whether every row of (B, S) is 0..S-1, so that the family's own position arithmetic applies.

    False after tokens were dropped, pooled or concatenated from several inputs.
    """
    return torch.equal(positions, torch.arange(positions.shape[1], device=positions.device).expand_as(positions))


def distances(positions: Tensor) -> Tensor:
    """Query position minus key position: (B, S) to (B, S, S)."""
    return positions.unsqueeze(2) - positions.unsqueeze(1)
