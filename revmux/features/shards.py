"""Shards: Arrow IPC files with a record batch per some thousand inputs.

The name of a file contains the hash of its content. A file is written batch by batch and mapped when it is first read, so
its size needs no memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from revmux.errors import UserError
from revmux.utils.content_hash import Sink
from revmux.utils.place import Place

FORMAT = 3
META = "meta.json"
"""The file that describes a store."""
PART_INPUTS, PART_TOKENS = 2_048, 65_536
"""Maximum number of inputs and tokens per part, which limits the memory of a writer."""
SHARD_BYTES = 256 * 2**20
"""Size of the shards of large stores. A process maps one file per shard, and systems limit the number of maps."""
FEWEST_SHARDS = 16
"""Number of shards below which a shard does not grow to :data:`SHARD_BYTES`, so that workers can share the work."""
_NAME = re.compile(r"shard-(\d+)\.([0-9a-f]{32})\.arrow")
_NOTES = b"revmux"


@dataclass(frozen=True)
class Layout:
    """The division of the rows 0..M-1 into parts, and of the parts into shards. Both are ranges of rows.

    A part is one record batch of a shard's file. The size of a layout does not grow with that of a row.

    Attributes:
        parts: (P + 1,) the first row of each part, and M.
        shards: (S + 1,) the first part of each shard, and P.
    """

    parts: np.ndarray
    shards: np.ndarray

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.shards) - 1

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        first, last = self.parts[self.shards[shard : shard + 2]].tolist()
        return range(first, last)

    def parts_of(self, shard: int) -> list[np.ndarray]:
        """The rows of each part of a shard."""
        bounds = self.parts[self.shards[shard] : self.shards[shard + 1] + 1].tolist()
        return [np.arange(first, last) for first, last in pairwise(bounds)]

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The part of each row: (B,) to (B,)."""
        return np.searchsorted(self.parts, rows, side="right") - 1

    def shard_of(self, part: int) -> int:
        """The shard of a part."""
        return int(np.searchsorted(self.shards, part, side="right")) - 1


def assign_shards(lengths: np.ndarray, shard_inputs: int) -> Layout:
    """Divide the rows of a store into parts and shards.

    Args:
        lengths: (M,) tokens per input.
        shard_inputs: maximum number of inputs per shard.
    """
    parts, shards = [0], [0]
    for start in range(0, len(lengths), shard_inputs):
        end = min(start + shard_inputs, len(lengths))
        while parts[-1] < end:
            window = lengths[parts[-1] : min(parts[-1] + PART_INPUTS, end)]
            fitting = int(np.searchsorted(np.cumsum(window, dtype=np.int64), PART_TOKENS, side="right"))
            parts.append(parts[-1] + max(fitting, 1))
        shards.append(len(parts) - 1)
    return Layout(np.array(parts), np.array(shards))


def inputs_per_shard(inputs: int, input_bytes: int) -> int:
    """The number of inputs per shard: shards of :data:`SHARD_BYTES`, but at least :data:`FEWEST_SHARDS` of them.

    Args:
        inputs: M.
        input_bytes: bytes per input.
    """
    return max(PART_INPUTS, min(-(-SHARD_BYTES // input_bytes), -(-inputs // FEWEST_SHARDS)))


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


class ShardWriter:
    """Writes the parts of one shard, in their order.

    Args:
        sink: the file.
        notes: metadata that is stored in the file as JSON.
    """

    def __init__(self, sink: Sink, notes: Mapping[str, Any]) -> None:
        self.sink, self._notes = sink, json.dumps(dict(notes))
        self._writer: Any = None

    def add(self, columns: Mapping[str, pa.Array]) -> None:
        """Write the columns of a part, with one row per input. Every part has the same columns."""
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        batch = batch.replace_schema_metadata({_NOTES: self._notes})
        if self._writer is None:
            self._writer = pa.ipc.new_file(pa.PythonFile(self.sink, "w"), batch.schema)
        self._writer.write_batch(batch)

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()


class ShardSet:
    """The shards of the tokens, of the teacher, or of the states of one layer.

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
                Otherwise, :meth:`read` checks their content.

        Returns:
            The missing shards.
        """
        names: dict[int, str] = {}
        self._damaged.clear()
        for name in self.place.files():
            match = _NAME.fullmatch(name)
            if match is None or int(match[1]) in names:
                continue
            if not verify or self._is_intact(name):
                names[int(match[1])] = name
            else:
                self._damaged.add(name)
        self.names = names
        return [index for index in range(self.size) if index not in names]

    def sweep(self) -> None:
        """Remove unfinished files of interrupted writers and damaged shards. The caller must hold the lock."""
        self.place.sweep()
        while self._damaged:
            self.place.remove_file(self._damaged.pop())

    @contextmanager
    def writing(self, index: int, notes: Mapping[str, Any] | None = None) -> Iterator[ShardWriter]:
        """Write a shard atomically, part by part.

        Args:
            index: number of the shard.
            notes: metadata that is stored in the file as JSON.

        Raises:
            UserError: the shard cannot be written.
        """

        def final(digest: str) -> str:
            self.names[index] = f"shard-{index:05d}.{digest}.arrow"
            return self.names[index]

        with self.place.writing(f"shard-{index:05d}", final) as sink:
            writer = ShardWriter(sink, notes or {})
            yield writer
            writer.close()

    def read(self, index: int) -> tuple[pa.RecordBatchFileReader, pa.Buffer]:
        """The parts of a shard, and the memory-mapped file that contains them.

        The first call copies a remote shard, and compares the content of the shard with its hash.

        Raises:
            UserError: the shard was removed, or it is damaged and is removed now.
        """
        name = self.names[index]
        if not self._is_intact(name):
            with suppress(FileNotFoundError):
                self.place.remove_file(name)
            raise UserError(f"{self.place.file(name)} was damaged and has been removed; start again to rewrite it")
        data = self.mapped.read(name)
        if data is None:
            raise UserError(f"{self.mapped.file(name)} was removed while it was opened; start again")
        return pa.ipc.open_file(data), data

    def _is_intact(self, name: str) -> bool:
        if name in self._intact:
            return True
        match = _NAME.fullmatch(name)
        assert match is not None
        if self.copies is not None and self.copies.digest(name) != match[2]:
            self.place.copy(name, self.copies)
        if self.mapped.digest(name) != match[2]:
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
