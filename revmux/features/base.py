"""The features of an input that training and evaluation use: tokens or prefilled state, label, and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from revmux.backbone import HiddenState, TokenBatch


@dataclass(frozen=True)
class FeatureBatch:
    """The features of B inputs.

    Attributes:
        labels: (B,) long.
        tokens: each (B, S), for :meth:`MultiplexedClassifier.run_tokens`; None if states are stored.
        prefilled: states (B, S, d) at depth l; None if the model computes the prefill.
        teacher_vectors: (B, r), the input of the plain model's classifier; None without a teacher.
        teacher_scores: (B, C), the plain model's label scores; None without a teacher.
    """

    labels: Tensor
    tokens: TokenBatch | None = None
    prefilled: HiddenState | None = None
    teacher_vectors: Tensor | None = None
    teacher_scores: Tensor | None = None


class Features(Protocol):
    """The features of a split, with access to any rows.

    Attributes:
        labels: (M,) integers.
        lengths: (M,) integers, tokens per input.
    """

    labels: Tensor
    lengths: Tensor

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """The given rows, on the model's device, padded to the longest of them."""
        ...
