"""The precision loss of a narrower type on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from revmux.backbone import Backbone
from revmux.backbone.base import evaluating
from revmux.data.tokens import SplitTokens


@dataclass(frozen=True)
class Precision:
    """The loss of storing states in a narrower type.

    Attributes:
        max_relative_error: maximum over tokens of ‖stored − true‖ / ‖true‖.
        mean_relative_error: mean over tokens of the same ratio.
        changed: number of inputs whose label changes if the plain model continues from the stored state.
        inputs: number of measured inputs.
        tokens: number of their tokens.
    """

    max_relative_error: float
    mean_relative_error: float
    changed: int
    inputs: int
    tokens: int

    @classmethod
    def of(cls, parts: Sequence[Precision]) -> Precision:
        """Combine the measurements of several parts."""
        tokens = sum(part.tokens for part in parts)
        return cls(
            max_relative_error=max(part.max_relative_error for part in parts),
            mean_relative_error=sum(part.mean_relative_error * part.tokens for part in parts) / tokens,
            changed=sum(part.changed for part in parts),
            inputs=sum(part.inputs for part in parts),
            tokens=tokens,
        )

    def __str__(self) -> str:
        return (
            f"states lose {self.mean_relative_error:.1e} of their norm on average, {self.max_relative_error:.1e} at "
            f"most; {self.changed} of {self.inputs} labels change"
        )


def noted_precision(notes: Sequence[Mapping[str, Any]]) -> Precision | None:
    """The precision loss of a layer, from the notes of its shards. None if there is no loss."""
    parts = [Precision(**note) for note in notes if note]
    return Precision.of(parts) if parts else None


def spread(rows: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """At most ``count`` of the rows, evenly spaced."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64))
    return [int(row) for row in np.asarray(rows)[places]]


def measure_precision(
    backbone: Backbone, split: SplitTokens, rows: Sequence[int], layer: int, dtype: torch.dtype, batch_size: int = 64
) -> Precision:
    """Compare states at ``layer`` with the same states after conversion to ``dtype`` and back.

    Args:
        backbone: the cut model.
        split: the tokens.
        rows: inputs to measure.
        layer: depth of the states.
        dtype: type of the states on disk.
        batch_size: inputs per forward pass.
    """
    parts = []
    with evaluating(backbone), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = split.batch(rows[start : start + batch_size], backbone.device)
            true = backbone.run(backbone.embed(batch), layer)
            stored = replace(true, hidden=true.hidden.to(dtype).to(true.hidden.dtype))  # (B, S, d)
            error = (stored.hidden.float() - true.hidden.float()).norm(dim=-1)[true.mask]  # (T,)
            error = error / true.hidden.float().norm(dim=-1)[true.mask].clamp(min=1e-12)
            labels = [
                backbone.classify(backbone.answers(backbone.run(state, backbone.num_layers))[:, 0]).argmax(dim=-1)
                for state in (true, stored)
            ]
            changed = int((labels[0] != labels[1]).sum())
            parts.append(Precision(float(error.max()), float(error.mean()), changed, len(labels[0]), len(error)))
    return Precision.of(parts)
