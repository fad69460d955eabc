"""Pad token lists as a tokenizer does, in arrays. Padding lists in Python takes longer than a small model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from revmux.backbone import TokenBatch


class Padder:
    """Pads on the side and with the values of a tokenizer. Threads can share it.

    Args:
        tokenizer: the tokenizer, which is only used in the constructor and for new names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_left = tokenizer.padding_side == "left"
        self._fills: dict[str, int] = {}

    def lists(self, inputs: Sequence[Mapping[str, Sequence[int]]]) -> TokenBatch:
        """Pad the token lists of R inputs to tensors (R, S), with S the length of the longest list."""
        present = self.present(np.fromiter((len(tokens["input_ids"]) for tokens in inputs), np.int64, len(inputs)))
        batch = {}
        for name in inputs[0]:
            flat = np.fromiter(chain.from_iterable([tokens[name] for tokens in inputs]), np.int64)
            batch[name] = self.spread(name, flat, present)
        return batch

    def present(self, lengths: np.ndarray) -> np.ndarray:
        """The places of the tokens of R inputs: lengths (R,) to booleans (R, S)."""
        places = np.arange(lengths.max())  # (S,)
        own = lengths[:, None]
        present: np.ndarray = places >= lengths.max() - own if self._is_left else places < own
        return present

    def spread(self, name: str, flat: np.ndarray, present: np.ndarray) -> torch.Tensor:
        """Put values into their places and pad the others.

        Args:
            name: name of the tensor, such as ``input_ids``.
            flat: (T,) the values of all inputs, concatenated.
            present: (R, S) from :meth:`present`.
        """
        values = np.full(present.shape, self._fill(name), np.int64)
        values[present] = flat
        return torch.from_numpy(values)

    def _fill(self, name: str) -> int:
        """The value with which the tokenizer pads a tensor."""
        if name not in self._fills:
            lists = {"input_ids": [[1], [1, 1]], name: [[1], [1, 1]]}
            padded = self._tokenizer.pad(lists, return_tensors="np")
            self._fills[name] = int(padded[name][0, 0 if self._is_left else 1])
        return self._fills[name]
