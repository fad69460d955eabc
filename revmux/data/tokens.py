"""Tokenization of texts, and padded batches of tokens."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from revmux.backbone import TokenBatch
from revmux.data.blocks import blocks
from revmux.data.prompt import Prompt

TEXTS_AT_ONCE = 1024
"""Number of texts per tokenizer call. The tokenizer's metadata, such as offsets, is large and is not kept."""


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    prompt: Prompt | None = None,
) -> tuple[BatchEncoding, int]:
    """Tokenize texts, or pairs of texts, for the backbone.

    Args:
        tokenizer: the backbone's tokenizer.
        texts: one text per input.
        pairs: the second text of each input, or None.
        max_length: maximum number of tokens per input. With a prompt, the text is truncated, never the template.
        prompt: the template around each input, or None.

    Returns:
        Ragged token lists, and the number of truncated inputs.

    Raises:
        UserError: the template does not fit the inputs or ``max_length``.
    """
    if prompt is None:
        encoded = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=True, max_length=max_length)
        return encoded, sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
    seconds: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
    inputs = list(zip(texts, seconds, strict=True))
    written = [prompt.write(tokenizer, *pair) for pair in inputs]
    encoded = prompt.encode(tokenizer, written)
    too_long = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    if not too_long:
        return encoded, 0
    for row in too_long:
        written[row] = prompt.fit(tokenizer, *inputs[row], max_length)
    return prompt.encode(tokenizer, written), len(too_long)


class TokenDigest:
    """Hash of the tokens of a split, computed block by block. It does not depend on the size of the blocks.

    Args:
        tokenizer: the tokenizer, whose padding is part of the hash.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parts = {"": hashlib.blake2b(f"{tokenizer.padding_side} {tokenizer.pad_token_id}".encode())}

    def add(self, lengths: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Add some rows: tokens per input (R,), and each column (T,), all rows concatenated."""
        for name, values in {"lengths": lengths, **columns}.items():
            part = self._parts.setdefault(name, hashlib.blake2b())
            part.update(np.ascontiguousarray(values, "<i4").data)

    def hexdigest(self) -> str:
        """The hash of all rows so far."""
        digest = hashlib.blake2b(digest_size=16)
        for name, part in sorted(self._parts.items()):
            digest.update(name.encode() + part.digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenBlock:
    """The tokens of some rows of a split.

    Attributes:
        lengths: (R,) tokens per input.
        labels: (R,) integers.
        columns: the tensors that the backbone reads, such as ``input_ids``: each (T,) int32, all inputs concatenated.
        truncated: number of truncated inputs.
    """

    lengths: np.ndarray
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    truncated: int


def token_blocks(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: Prompt | None = None
) -> Iterator[TokenBlock]:
    """Tokenize a split in blocks of :data:`TEXTS_AT_ONCE` inputs; the arguments are those of :class:`TokenizedSplit`."""
    for block in blocks(split, TEXTS_AT_ONCE):
        rows = block.to_pydict()
        encoded, truncated = encode_texts(tokenizer, rows["text"], rows.get("text_pair"), max_length, prompt)
        yield TokenBlock(
            np.fromiter(map(len, encoded["input_ids"]), np.int64),
            np.array(rows["label"], np.int64),
            {name: np.fromiter(chain.from_iterable(ids), np.int32) for name, ids in encoded.items()},
            truncated,
        )


class SplitTokens(ABC):
    """The tokens of a split, without padding, and its labels.

    Attributes:
        tokenizer: the backbone's tokenizer, which pads batches.
        labels: (M,) integers.
        lengths: (M,) integers, tokens per input.
        truncated: number of inputs that were truncated.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: Tensor
    lengths: Tensor
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hash of the tokens. It depends on the data, the template, the tokenizer and the maximum length."""

    @abstractmethod
    def ragged(self, rows: Sequence[int] | Tensor) -> dict[str, list[list[int]]]:
        """The token lists of the given rows, by column."""

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> TokenBatch:
        """Rows padded to the longest of them: ``input_ids``, ``attention_mask`` and so on, each (B, S)."""
        padded = self.tokenizer.pad(self.ragged(rows), return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in padded.items()}


class TokenizedSplit(SplitTokens):
    """The tokens of a split in memory, a few bytes per token.

    Args:
        split: data set with the columns ``text``, ``label`` and optionally ``text_pair``.
        tokenizer: the backbone's tokenizer.
        max_length: maximum number of tokens per input.
        prompt: the template around each input, or None. :meth:`revmux.pretrained.pretrained.Pretrained.tokenize` sets it.

    Attributes:
        columns: the tensors that the backbone reads, such as ``input_ids``: each (T,), all inputs concatenated.
    """

    def __init__(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: Prompt | None = None
    ) -> None:
        self.tokenizer = tokenizer
        parts: dict[str, list[np.ndarray]] = {}
        lengths, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        self.truncated = 0
        for block in token_blocks(split, tokenizer, max_length, prompt):
            lengths.append(block.lengths)
            labels.append(block.labels)
            self.truncated += block.truncated
            for name, values in block.columns.items():
                parts.setdefault(name, []).append(values.astype(np.min_scalar_type(values.max(initial=0))))
        # Concatenation converts the parts to the widest of their dtypes.
        self.columns = {name: np.concatenate(values) for name, values in parts.items()}
        self.lengths, self.labels = (torch.from_numpy(np.concatenate(found)) for found in (lengths, labels))
        self._starts = np.concatenate([[0], np.cumsum(self.lengths.numpy())])

    @cached_property
    def digest(self) -> str:
        """See :attr:`SplitTokens.digest`."""
        digest = TokenDigest(self.tokenizer)
        digest.add(self.lengths.numpy(), self.columns)
        return digest.hexdigest()

    def ragged(self, rows: Sequence[int] | Tensor) -> dict[str, list[list[int]]]:
        """See :meth:`SplitTokens.ragged`."""
        slices = [slice(self._starts[int(row)], self._starts[int(row) + 1]) for row in rows]
        return {name: [values[part].tolist() for part in slices] for name, values in self.columns.items()}
