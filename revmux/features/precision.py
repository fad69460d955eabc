"""What a narrower type on disk costs in precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from revmux.backbone import Backbone
from revmux.backbone.base import evaluating
from revmux.data.tokens import TokenizedSplit


@dataclass(frozen=True)
class Precision:
    """The loss of storing states in a narrower type.

    Attributes:
        max_relative_error: the largest over tokens of ‖stored − true‖ / ‖true‖.
        mean_relative_error: its mean over tokens.
        changed_share: share of inputs whose label changes when the plain model goes on from the stored state.
        inputs: inputs that were measured.
    """

    max_relative_error: float
    mean_relative_error: float
    changed_share: float
    inputs: int

    def __str__(self) -> str:
        return (
            f"states lose {self.mean_relative_error:.1e} of their norm on average, {self.max_relative_error:.1e} at "
            f"most; {self.changed_share:.2%} of {self.inputs} labels change"
        )


def measure_precision(
    backbone: Backbone,
    split: TokenizedSplit,
    layer: int,
    dtype: torch.dtype,
    inputs: int = 256,
    batch_size: int = 64,
) -> Precision:
    """Compare states at ``layer`` with what is left of them after a round trip through ``dtype``.

    Args:
        backbone: the cut model.
        split: the tokens.
        layer: depth of the states.
        dtype: type of the states on disk.
        inputs: inputs to measure, evenly spread over the split.
        batch_size: inputs a forward pass.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, min(inputs, len(split))).round().astype(np.int64)).tolist()
    largest, total, tokens, changed = 0.0, 0.0, 0, 0
    with evaluating(backbone), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = split.batch(rows[start : start + batch_size], backbone.device)
            true = backbone.run(backbone.embed(batch), layer)
            stored = replace(true, hidden=true.hidden.to(dtype).to(true.hidden.dtype))  # (B, S, d)
            error = (stored.hidden.float() - true.hidden.float()).norm(dim=-1)[true.mask]  # (T,)
            error = error / true.hidden.float().norm(dim=-1)[true.mask].clamp(min=1e-12)
            largest, total, tokens = max(largest, float(error.max())), total + float(error.sum()), tokens + len(error)
            labels = [
                backbone.classify(backbone.answers(backbone.run(state, backbone.num_layers))[:, 0]).argmax(dim=-1)
                for state in (true, stored)
            ]
            changed += int((labels[0] != labels[1]).sum())
    return Precision(largest, total / tokens, changed / len(rows), len(rows))
