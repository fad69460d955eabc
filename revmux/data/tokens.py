"""Text to tokens, and tokens to padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from revmux.backbone import TokenBatch


class TokenizedSplit:
    """A split as tokens, ragged until it is batched.

    Args:
        split: columns ``text``, optionally ``text_pair``, and ``label``.
        tokenizer: the backbone's.
        max_length: tokens an input is cut to.

    Attributes:
        labels: (M,) long.
        lengths: (M,) long, tokens an input.
        truncated: inputs that were cut to ``max_length``.
    """

    def __init__(self, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        pairs = list(split["text_pair"]) if "text_pair" in split.column_names else None
        self.encoded = tokenizer(list(split["text"]), pairs, truncation=True, max_length=max_length)
        self.labels = torch.tensor(split["label"], dtype=torch.long)
        self.lengths = torch.tensor([len(ids) for ids in self.encoded["input_ids"]], dtype=torch.long)
        self.truncated = sum(bool(encoding.overflowing) for encoding in self.encoded.encodings or [])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> TokenBatch:
        """Rows padded to their longest: ``input_ids``, ``attention_mask`` and the like, each (B, S)."""
        picked = {name: [values[int(row)] for row in rows] for name, values in self.encoded.items()}
        padded = self.tokenizer.pad(picked, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in padded.items()}
