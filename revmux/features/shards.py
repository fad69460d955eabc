"""Ragged rows as Arrow IPC files of some thousand inputs, each trusted only as its manifest describes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from revmux.errors import UserError
from revmux.features.place import Place

FORMAT = 1
_MANIFEST = "manifest.json"
SHARD_TOKENS = 65_536
"""Most tokens in a shard, so that a writer's memory stays small also where inputs are long."""


def plan_shards(lengths: np.ndarray, shard_inputs: int) -> list[np.ndarray]:
    """Which inputs go into which shard: the longest first, so that want of memory shows at once.

    Args:
        lengths: (M,) tokens an input.
        shard_inputs: most inputs in a shard.

    Returns:
        Row numbers of each shard.
    """
    order = np.argsort(-lengths, kind="stable")
    plan, start = [], 0
    while start < len(order):
        window = order[start : start + shard_inputs]
        fitting = int(np.searchsorted(np.cumsum(lengths[window]), SHARD_TOKENS, side="right"))
        plan.append(window[: max(fitting, 1)])
        start += len(plan[-1])
    return plan


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


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard is known by.

    Attributes:
        rows: inputs in it.
        bytes: size of its file.
        digest: hash of its file.
        modified: time of its last change, in nanoseconds; None where the filesystem keeps none.
    """

    rows: int
    bytes: int
    digest: str
    modified: int | None


class ShardSet:
    """The shards of one thing: the teacher, or the states of one layer.

    Args:
        place: their folder.
        rows: inputs that each shard is to hold.

    Attributes:
        notes: what the manifest says beside the shards.
    """

    def __init__(self, place: Place, rows: list[int]) -> None:
        self.place, self.rows = place, rows
        self.records: dict[int, ShardRecord] = {}
        self.notes: dict[str, Any] = {}
        content = read_json(place, _MANIFEST)
        if content.get("format") == FORMAT:
            self.notes = content["notes"]
            self.records = {
                int(index): ShardRecord(**record)
                for index, record in content["shards"].items()
                if int(index) < len(rows) and record["rows"] == rows[int(index)]
            }

    def complete(self) -> bool:
        """Whether every shard is there as it was written, by size and time of change."""
        return len(self.records) == len(self.rows) and all(
            stat == (self.records[index].bytes, self.records[index].modified)
            for index, stat in enumerate(self._stats())
        )

    def repair(self) -> list[int]:
        """Read again what was changed since it was written, and forget what does not hold what it should.

        Returns:
            Shards to be written.
        """
        for index, stat in enumerate(self._stats()):
            record = self.records.get(index)
            if record is None or stat == (record.bytes, record.modified):
                continue
            data = self.place.read(_name(index)) if stat is not None and stat[0] == record.bytes else None
            if stat is not None and data is not None and _digest(data) == record.digest:
                self.records[index] = ShardRecord(record.rows, record.bytes, record.digest, stat[1])
            else:
                del self.records[index]
        return [index for index in range(len(self.rows)) if index not in self.records]

    def write(self, index: int, columns: Mapping[str, pa.Array]) -> None:
        """Write a shard whole, then enter it in the manifest."""
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        self.place.write(_name(index), data)
        stat = self.place.stats([_name(index)])[0]
        assert stat is not None
        self.records[index] = ShardRecord(batch.num_rows, data.size, _digest(data), stat[1])
        self.save()

    def read(self, index: int) -> pa.RecordBatch:
        """A shard, memory-mapped where its filesystem is local.

        Raises:
            UserError: the shard is gone.
        """
        data = self.place.read(_name(index))
        if data is None:
            raise UserError(f"{self.place.file(_name(index))} was removed while it was opened; start again")
        return pa.ipc.open_file(data).get_batch(0)

    def save(self) -> None:
        """Write the manifest."""
        shards = {str(index): asdict(record) for index, record in sorted(self.records.items())}
        write_json(self.place, _MANIFEST, {"format": FORMAT, "notes": self.notes, "shards": shards})

    def _stats(self) -> list[tuple[int, int | None] | None]:
        return self.place.stats([_name(index) for index in range(len(self.rows))])


def read_json(place: Place, name: str) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read."""
    data = place.read(name)
    try:
        return {} if data is None else dict(json.loads(data.to_pybytes()))
    except ValueError:
        return {}


def write_json(place: Place, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    place.write(name, json.dumps(content, indent=2, sort_keys=True).encode())


def _name(index: int) -> str:
    return f"shard-{index:05d}.arrow"


def _digest(data: pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
