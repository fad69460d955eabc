"""What flows through a cut backbone: tokens, then hidden states that carry their depth.

Shape legend, used in every file:
    B: inputs              G: groups            N: inputs per group
    S: tokens              d: hidden size       C: classes
    L: layers              l: prefill layers    A: answer positions in a sequence
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TokenBatch = dict[str, Tensor]
"""Output of a tokenizer: ``input_ids`` and ``attention_mask``, each (B, S), and whatever else the family reads."""


@dataclass(frozen=True)
class HiddenState:
    """Hidden sequences at one depth of the backbone, with everything that the next layers need.

    The same type describes B plain inputs and G shared sequences, so the upper layers do not need
    to know whether their input is multiplexed.

    Attributes:
        hidden: (B, S, d) states after ``depth`` layers.
        mask: (B, S) bool, True for tokens and False for padding.
        answer: (B, A) long, positions at which answers are read: one for a plain input, and one or N in a shared
            sequence.
        depth: number of layers that these states have passed, from 0 (embeddings) to L.
        positions: (B, S) long, token positions for families that use them in every layer (rotary,
            relative); None for other families.
        segments: (B, S) long, 0 for padding and k for tokens of the k-th input, when inputs are
            concatenated in one sequence and must not attend to each other; None when all tokens may.
        spans: (B, A, S) bool, the tokens of each answer, for heads that pool over tokens; None for other heads.
        decoder: the decoder's own input stream, for encoder-decoders whose decoder reads the text too.
    """

    hidden: Tensor
    mask: Tensor
    answer: Tensor
    depth: int
    positions: Tensor | None = None
    segments: Tensor | None = None
    spans: Tensor | None = None
    decoder: HiddenState | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> HiddenState:
        """The same state with ``function`` applied to every tensor (all have the batch axis first)."""

        def apply(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return replace(
            self,
            hidden=function(self.hidden),
            mask=function(self.mask),
            answer=function(self.answer),
            positions=apply(self.positions),
            segments=apply(self.segments),
            spans=apply(self.spans),
            decoder=None if self.decoder is None else self.decoder.map(function),
        )

    def take(self, rows: Tensor) -> HiddenState:
        """Rows by index. An index tensor (G, N) gives every tensor the leading shape (G, N).

        Args:
            rows: long tensor of any shape, values in 0..B-1.
        """
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> HiddenState:
        """The same state on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def cast(self, dtype: torch.dtype) -> HiddenState:
        """The same state with its hidden states in another precision; nothing else is cast."""
        decoder = None if self.decoder is None else self.decoder.cast(dtype)
        return replace(self, hidden=self.hidden.to(dtype), decoder=decoder)

    def read(self) -> Tensor:
        """The hidden states at the answer positions: (B, A, d)."""
        index = self.answer.unsqueeze(-1).expand(-1, -1, self.hidden.shape[-1])  # (B, A, d)
        return self.hidden.gather(1, index)
