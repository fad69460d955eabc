"""What flows through a cut backbone: tokens, then hidden states that carry their depth.

Shape legend, used in every file:
    B: inputs              G: groups            N: inputs per group
    S: tokens              d: hidden size       C: classes
    L: layers              l: prefill layers    A: answer positions in a sequence
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TokenBatch = dict[str, Tensor]
"""Output of a tokenizer: ``input_ids`` and ``attention_mask``, each (B, S), and whatever else the family reads."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What causal layers keep of the P constant tokens in front of every sequence; see :mod:`revmux.backbone.prefix`.

    Attributes:
        hidden: states (1, P, d) at each computed depth.
        layers: keys and values of each computed layer, by its index from 0, each (1, H, P, d/H).
        positions: (1, P) long, for families that use positions in every layer.
    """

    hidden: Mapping[int, Tensor]
    layers: Mapping[int, tuple[Tensor, Tensor]]
    positions: Tensor | None = None

    def __len__(self) -> int:
        return next(iter(self.hidden.values())).shape[1]

    def to(self, device: torch.device | str) -> Prefix:
        """The same prefix on another device."""
        return Prefix(
            {depth: hidden.to(device) for depth, hidden in self.hidden.items()},
            {index: (keys.to(device), values.to(device)) for index, (keys, values) in self.layers.items()},
            None if self.positions is None else self.positions.to(device),
        )

    def state(self, depth: int) -> HiddenState:
        """The constant tokens at one depth as a sequence of their own, (1, P, d)."""
        hidden = self.hidden[depth]
        places = torch.arange(len(self), device=hidden.device).unsqueeze(0)  # (1, P)
        return HiddenState(
            hidden=hidden,
            mask=torch.ones_like(places, dtype=torch.bool),
            answer=places[:, -1:],
            depth=depth,
            positions=self.positions,
        )


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
        prefix: the constant tokens before every sequence, which ``hidden`` does not contain; None if there are none.
    """

    hidden: Tensor
    mask: Tensor
    answer: Tensor
    depth: int
    positions: Tensor | None = None
    segments: Tensor | None = None
    spans: Tensor | None = None
    decoder: HiddenState | None = None
    prefix: Prefix | None = None

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
        prefix = None if self.prefix is None else self.prefix.to(device)
        return replace(self.map(lambda tensor: tensor.to(device)), prefix=prefix)

    def cast(self, dtype: torch.dtype) -> HiddenState:
        """The same state with its hidden states in another precision; nothing else is cast."""
        decoder = None if self.decoder is None else self.decoder.cast(dtype)
        return replace(self, hidden=self.hidden.to(dtype), decoder=decoder)

    def read(self) -> Tensor:
        """The hidden states at the answer positions: (B, A, d)."""
        index = self.answer.unsqueeze(-1).expand(-1, -1, self.hidden.shape[-1])  # (B, A, d)
        return self.hidden.gather(1, index)

    def whole(self) -> HiddenState:
        """Plain inputs with their constant prefix as ordinary tokens, directly before each first token: (B, P + S, d)."""
        if self.prefix is None:
            return self
        constant, rows = self.prefix.state(self.depth), len(self)
        source, mask = insert_before(self.mask, len(self.prefix))  # (B, P + S) both

        def joined(of_prefix: Tensor, own: Tensor) -> Tensor:
            longer = torch.cat([of_prefix.expand(rows, *of_prefix.shape[1:]), own], dim=1)  # (B, P + S, ...)
            return longer.gather(1, source.view(*source.shape, *[1] * (own.dim() - 2)).expand_as(longer))

        positions = self.positions
        if positions is not None and constant.positions is not None:
            positions = joined(constant.positions, positions)
        return HiddenState(
            hidden=joined(constant.hidden, self.hidden),
            mask=mask,
            answer=self.answer + len(self.prefix),
            depth=self.depth,
            positions=positions,
        )


def insert_before(mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where tokens come from if ``length`` new ones are put directly before each input's first token.

    Args:
        mask: (B, S) bool.
        length: P.

    Returns:
        For each place of the longer sequence the place in [new tokens ; sequence], (B, P + S), and its mask.
    """
    rows, tokens = mask.shape
    mask = torch.cat([mask.new_ones(rows, length), mask], dim=1)  # (B, P + S)
    padding = mask[:, length:].int().argmax(dim=1, keepdim=True)  # (B, 1) padding on the left
    place = torch.arange(length + tokens, device=mask.device).expand(rows, -1)
    source = torch.where(place < padding, place + length, place - padding)
    source = torch.where(place < padding + length, source, place)  # (B, P + S)
    return source, mask.gather(1, source)
