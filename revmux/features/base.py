"""What training and evaluation read of an input: its tokens or its prefilled state, label, and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from revmux.backbone import HiddenState, TokenBatch


@dataclass(frozen=True)
class FeatureBatch:
    """B inputs.

    Attributes:
        labels: (B,) long.
        tokens: each (B, S); what :meth:`MultiplexedClassifier.run_tokens` takes. None where states are stored.
        prefilled: states (B, S, d) at depth l; None where the prefill is to be computed.
        teacher_vectors: (B, r), what the plain model's classifier reads; None without a teacher.
        teacher_scores: (B, C), the plain model's label scores; None without a teacher.
    """

    labels: Tensor
    tokens: TokenBatch | None = None
    prefilled: HiddenState | None = None
    teacher_vectors: Tensor | None = None
    teacher_scores: Tensor | None = None


class Features(Protocol):
    """A split that can be asked for any rows.

    Attributes:
        labels: (M,) long.
        lengths: (M,) long, tokens an input.
    """

    labels: Tensor
    lengths: Tensor

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """The rows asked for, on the model's device, padded to the longest of them."""
        ...
