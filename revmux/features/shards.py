"""Ragged rows as Arrow IPC files of some thousand inputs, each named by the hash of its bytes and trusted only by it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from revmux.errors import UserError
from revmux.features.place import Place

FORMAT = 2
SHARD_TOKENS = 65_536
"""Most tokens in a shard, so that a writer's memory stays small also where inputs are long."""
_NAME = re.compile(r"shard-(\d+)\.([0-9a-f]{32})\.arrow")
_NOTES = b"revmux"


def assign_shards(lengths: np.ndarray, shard_inputs: int) -> list[np.ndarray]:
    """Which inputs go into which shard: the longest first, so that want of memory shows at once.

    Args:
        lengths: (M,) tokens an input.
        shard_inputs: most inputs in a shard.

    Returns:
        Row numbers of each shard.
    """
    order = np.argsort(-lengths, kind="stable")
    shard_rows, start = [], 0
    while start < len(order):
        window = order[start : start + shard_inputs]
        fitting = int(np.searchsorted(np.cumsum(lengths[window]), SHARD_TOKENS, side="right"))
        shard_rows.append(window[: max(fitting, 1)])
        start += len(shard_rows[-1])
    return shard_rows


def ragged_column(values: Tensor, counts: Tensor) -> pa.Array:
    """Rows of unequal length, one list an input, without copying.

    Args:
        values: (T, ...) on the CPU, all rows' tokens one after the other; bfloat16 is stored as 2-byte binary.
        counts: (R,) tokens a row.
    """
    offsets = np.concatenate([[0], np.cumsum(counts.numpy())])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), _flat(values))


def fixed_column(values: Tensor) -> pa.Array:
    """Rows of equal width, one list an input: values (R, W) on the CPU."""
    return _flat(values)


def ragged_values(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`ragged_column` made, in place: values (T, ...), bfloat16 as int16, and offsets (R + 1,)."""
    return fixed_values(column.values), np.frombuffer(column.buffers()[1], np.int64)[: len(column) + 1]


def fixed_values(column: pa.Array) -> np.ndarray:
    """What :func:`fixed_column` made, in place: (R, W), bfloat16 as int16."""
    if not pa.types.is_fixed_size_list(column.type):
        return np.frombuffer(column.buffers()[1], _numpy_type(column.type))
    return fixed_values(column.values).reshape(-1, column.type.list_size)


def _flat(values: Tensor) -> pa.Array:
    values = values.contiguous()
    if values.dtype == torch.bfloat16:
        kind, array = pa.binary(2), values.view(torch.int16).numpy()
    else:
        array = values.numpy()
        kind = pa.from_numpy_dtype(array.dtype)
    flat = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(array)])
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _numpy_type(kind: pa.DataType) -> Any:
    return np.int16 if pa.types.is_fixed_size_binary(kind) else kind.to_pandas_dtype()


class ShardSet:
    """The shards of one thing: the teacher, or the states of one layer.

    A shard's name carries the hash of its bytes. So any process may write one without telling the others, and any
    can tell whether one is what was written.

    Args:
        place: their folder.
        size: how many there are to be.
        copies: local folder that shards are copied to, to be mapped from there; None where ``place`` is local.

    Attributes:
        names: file name of each shard that was found.
        mapped: where shards are mapped from.
    """

    def __init__(self, place: Place, size: int, copies: Place | None = None) -> None:
        self.place, self.size, self.copies = place, size, copies
        self.mapped = copies or place
        self.names: dict[int, str] = {}
        self._intact: set[str] = set()
        self._damaged: set[str] = set()

    def find(self, verify: bool = True) -> list[int]:
        """Look which shards are there; one whose bytes are not what was written counts as missing.

        Args:
            verify: read and hash those that were not hashed yet, which copies those of a remote place; else their
                names are believed.

        Returns:
            Shards that are missing.
        """
        names: dict[int, str] = {}
        self._damaged.clear()
        for name in self.place.files():
            match = _NAME.fullmatch(name)
            if match is not None and int(match[1]) not in names and (not verify or self._is_intact(name, match[2])):
                names[int(match[1])] = name
        self.names = names
        return [index for index in range(self.size) if index not in names]

    def sweep(self) -> None:
        """Remove what interrupted writers left, and shards found damaged; for the holder of the lock."""
        self.place.sweep()
        while self._damaged:
            self.place.remove_file(self._damaged.pop())

    def write(self, index: int, columns: Mapping[str, pa.Array], notes: Mapping[str, Any] | None = None) -> None:
        """Write a shard whole.

        Args:
            index: its number.
            columns: one row an input.
            notes: what is to be known of it, as JSON.

        Raises:
            UserError: it cannot be written.
        """
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        batch = batch.replace_schema_metadata({_NOTES: json.dumps(dict(notes or {}))})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        name = f"shard-{index:05d}.{xxhash.xxh3_128_hexdigest(data)}.arrow"
        self.place.write(name, data)
        self.names[index] = name

    def read(self, index: int) -> tuple[pa.RecordBatch, pa.Buffer]:
        """A shard, and the memory-mapped file that its columns lie in.

        Raises:
            UserError: the shard is gone.
        """
        name = self.names[index]
        data = self.mapped.read(name)
        if data is None:
            raise UserError(f"{self.mapped.file(name)} was removed while it was opened; start again")
        return pa.ipc.open_file(data).get_batch(0), data

    def _is_intact(self, name: str, digest: str) -> bool:
        if name in self._intact:
            return True
        if self.copies is not None and self.copies.digest(name) != digest:
            self.place.copy(name, self.copies)
        if self.mapped.digest(name) != digest:
            self._damaged.add(name)
            return False
        self._intact.add(name)
        return True


def read_notes(place: Place) -> list[dict[str, Any]]:
    """What was noted of each shard in a folder, from the ends of the files alone; unreadable ones are passed over."""
    notes = []
    for name in filter(_NAME.fullmatch, place.files()):
        with suppress(OSError, pa.ArrowInvalid, KeyError), place.filesystem.open_input_file(place.file(name)) as file:
            notes.append(json.loads(pa.ipc.open_file(file).schema.metadata[_NOTES]))
    return notes


def read_object(place: Place, name: str) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read."""
    data = place.read(name)
    try:
        return {} if data is None else dict(json.loads(data.to_pybytes()))
    except ValueError:
        return {}


def write_object(place: Place, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    place.write(name, json.dumps(content, indent=2, sort_keys=True).encode())
