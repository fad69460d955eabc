"""Hash of labelled texts, computed over blocks of Arrow buffers instead of row by row."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from revmux.data.blocks import blocks


def content_digest(split: Dataset) -> str:
    """SHA-256 of the texts and labels of a split, in their order.

    It does not depend on how the rows are divided into chunks, nor on the width of the Arrow types.

    Args:
        split: columns of text without missing values, and of integers.
    """
    hashes = {name: (hashlib.sha256(), hashlib.sha256()) for name in sorted(split.column_names)}
    for block in blocks(split):
        for name, pair in hashes.items():
            for chunk in block[name].chunks:
                _add(chunk, *pair)
    whole = hashlib.sha256(str(len(split)).encode())
    for name, pair in hashes.items():
        whole.update(name.encode() + b"".join(part.digest() for part in pair))
    return whole.hexdigest()


def _add(values: pa.Array, lengths: Any, content: Any) -> None:
    """Add a chunk of a column: of a text the length in bytes and the bytes, of a number its value."""
    if pa.types.is_integer(values.type):
        content.update(values.to_numpy(zero_copy_only=False).astype("<i8"))
        return
    texts = values.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths.update(np.diff(bounds).astype("<i8"))
    if bounds[-1] > bounds[0]:
        content.update(memoryview(data)[bounds[0] : bounds[-1]])
