"""Shards: Arrow IPC files of up to some thousand inputs. The name of a file contains the hash of its content."""

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
"""Maximum number of tokens per shard, which limits the memory of a writer even if inputs are long."""
_NAME = re.compile(r"shard-(\d+)\.([0-9a-f]{32})\.arrow")
_NOTES = b"revmux"


def assign_shards(lengths: np.ndarray, shard_inputs: int) -> list[np.ndarray]:
    """Assign inputs to shards, the longest first, so that a lack of memory shows at once.

    Args:
        lengths: (M,) tokens per input.
        shard_inputs: maximum number of inputs per shard.

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
    """A column of rows of different length, one list per input, without copying.

    Args:
        values: (T, ...) on the CPU, the tokens of all rows, concatenated. bfloat16 is stored as 2-byte binary.
        counts: (R,) tokens per row.
    """
    offsets = np.concatenate([[0], np.cumsum(counts.numpy())])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), _flat(values))


def fixed_column(values: Tensor) -> pa.Array:
    """A column of rows of equal width, one list per input: values (R, W) on the CPU."""
    return _flat(values)


def ragged_values(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Views of a :func:`ragged_column`: values (T, ...), bfloat16 as int16, and offsets (R + 1,)."""
    return fixed_values(column.values), np.frombuffer(column.buffers()[1], np.int64)[: len(column) + 1]


def fixed_values(column: pa.Array) -> np.ndarray:
    """View of a :func:`fixed_column`: (R, W), bfloat16 as int16."""
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
    """The shards of the teacher, or of the states of one layer.

    The name of a shard contains the hash of its content. Processes can therefore write shards without coordination,
    and every process can verify a shard.

    Args:
        place: folder of the shards.
        size: total number of shards.
        copies: local folder to which shards are copied for memory mapping; None if ``place`` is local.

    Attributes:
        names: file name of each shard that was found.
        mapped: folder from which shards are mapped.
    """

    def __init__(self, place: Place, size: int, copies: Place | None = None) -> None:
        self.place, self.size, self.copies = place, size, copies
        self.mapped = copies or place
        self.names: dict[int, str] = {}
        self._intact: set[str] = set()
        self._damaged: set[str] = set()

    def find(self, verify: bool = True) -> list[int]:
        """Find the existing shards. A shard whose content does not match its hash counts as missing.

        Args:
            verify: whether to read and hash shards that were not hashed before. This copies shards of a remote folder.
                Otherwise, their content is not checked.

        Returns:
            The missing shards.
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
        """Remove unfinished files of interrupted writers and damaged shards. The caller must hold the lock."""
        self.place.sweep()
        while self._damaged:
            self.place.remove_file(self._damaged.pop())

    def write(self, index: int, columns: Mapping[str, pa.Array], notes: Mapping[str, Any] | None = None) -> None:
        """Write a shard atomically.

        Args:
            index: number of the shard.
            columns: the columns, with one row per input.
            notes: metadata that is stored in the file as JSON.

        Raises:
            UserError: the shard cannot be written.
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
        """A shard, and the memory-mapped file that contains its columns.

        Raises:
            UserError: the shard was removed.
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
    """The notes of all shards in a folder. Only the ends of the files are read; unreadable files are skipped."""
    notes = []
    for name in filter(_NAME.fullmatch, place.files()):
        with suppress(OSError, pa.ArrowInvalid, KeyError), place.filesystem.open_input_file(place.file(name)) as file:
            notes.append(json.loads(pa.ipc.open_file(file).schema.metadata[_NOTES]))
    return notes


def read_object(place: Place, name: str) -> dict[str, Any]:
    """A JSON object from a file, empty if the file is missing or unreadable."""
    data = place.read(name)
    try:
        return {} if data is None else dict(json.loads(data.to_pybytes()))
    except ValueError:
        return {}


def write_object(place: Place, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a file."""
    place.write(name, json.dumps(content, indent=2, sort_keys=True).encode())
