"""Tokenization of texts, and padded batches of tokens."""

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


class TokenizedSplit:
    """The tokens of a split. They are stored without padding, a few bytes per token, and padded per batch.

    Args:
        split: data set with the columns ``text``, ``label`` and optionally ``text_pair``.
        tokenizer: the backbone's tokenizer.
        max_length: maximum number of tokens per input.
        prompt: the template around each input, or None. :meth:`revmux.pretrained.pretrained.Pretrained.tokenize` sets it.

    Attributes:
        columns: the tensors that the backbone reads, such as ``input_ids``: each (T,), all inputs concatenated.
        labels: (M,) long.
        lengths: (M,) long, tokens per input.
        truncated: number of inputs that were truncated to ``max_length``.
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
        # Concatenation converts the parts to the widest of their dtypes.
        self.columns = {name: np.concatenate(values) for name, values in parts.items()}
        self.lengths = torch.tensor(lengths, dtype=torch.long)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> TokenBatch:
        """Rows padded to the longest of them: ``input_ids``, ``attention_mask`` and so on, each (B, S)."""
        slices = [slice(self._starts[int(row)], self._starts[int(row) + 1]) for row in rows]
        ragged = {name: [values[part].tolist() for part in slices] for name, values in self.columns.items()}
        padded = self.tokenizer.pad(ragged, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in padded.items()}
