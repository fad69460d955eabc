"""Text to tokens, and tokens to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from revmux.backbone import TokenBatch
from revmux.data.prompt import Prompt

TEXTS_AT_ONCE = 1024
"""Texts that the tokenizer sees at once: what it notes of each, such as offsets, is large and not kept."""


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    prompt: Prompt | None = None,
) -> tuple[BatchEncoding, int]:
    """Texts, or pairs of texts, as the backbone reads them.

    Args:
        tokenizer: the backbone's.
        texts: one an input.
        pairs: the second text of each input, or None.
        max_length: tokens that an input is cut to; with a prompt the text is cut, never the template.
        prompt: the template around each input, or None.

    Returns:
        Ragged token lists, and how many inputs were cut.

    Raises:
        UserError: a template that does not fit the inputs or ``max_length``.
    """
    if prompt is None:
        encoded = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=True, max_length=max_length)
        return encoded, sum(bool(encoding.overflowing) for encoding in encoded.encodings or [])
    seconds: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
    inputs = list(zip(texts, seconds, strict=True))
    written = [prompt.write(tokenizer, *own) for own in inputs]
    encoded = prompt.encode(tokenizer, written)
    too_long = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    if not too_long:
        return encoded, 0
    for row in too_long:
        written[row] = prompt.fit(tokenizer, *inputs[row], max_length)
    return prompt.encode(tokenizer, written), len(too_long)


class TokenizedSplit:
    """A split as tokens, ragged until it is batched; a few bytes a token, whatever the tokenizer notes of it.

    Args:
        split: columns ``text``, optionally ``text_pair``, and ``label``.
        tokenizer: the backbone's.
        max_length: tokens an input is cut to.
        prompt: the template around each input, or None; :meth:`revmux.pretrained.pretrained.Pretrained.tokenize` knows it.

    Attributes:
        columns: what the backbone reads, such as ``input_ids``: each (T,), all inputs one after the other.
        labels: (M,) long.
        lengths: (M,) long, tokens an input.
        truncated: inputs that were cut to ``max_length``.
    """

    def __init__(
        self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: Prompt | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.labels = torch.tensor(split["label"], dtype=torch.long)
        parts: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        self.truncated = 0
        for texts in split.iter(TEXTS_AT_ONCE):
            encoded, truncated = encode_texts(tokenizer, texts["text"], texts.get("text_pair"), max_length, prompt)
            lengths += map(len, encoded["input_ids"])
            self.truncated += truncated
            for name, rows in encoded.items():
                values = np.fromiter(chain.from_iterable(rows), np.int32)
                parts.setdefault(name, []).append(values.astype(np.min_scalar_type(values.max(initial=0))))
        self.columns = {name: np.concatenate(values) for name, values in parts.items()}  # as wide as the widest
        self.lengths = torch.tensor(lengths, dtype=torch.long)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> TokenBatch:
        """Rows padded to their longest: ``input_ids``, ``attention_mask`` and the like, each (B, S)."""
        places = [slice(self._starts[int(row)], self._starts[int(row) + 1]) for row in rows]
        picked = {name: [values[place].tolist() for place in places] for name, values in self.columns.items()}
        padded = self.tokenizer.pad(picked, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in padded.items()}
