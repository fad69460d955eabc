"""Common parts of formats whose records are text lines. Their ranges are ranges of bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem

from revmux.bulk.formats.base import Columns, Range, Rows

_BOM = b"\xef\xbb\xbf"
_BUFFER = 1 << 20


class ByteLines:
    """The lines of a file as strings. Bytes that are not UTF-8 become lone surrogates.

    Args:
        stream: the file, at the start of a line.

    Attributes:
        position: number of bytes of all lines so far, from the start of the stream.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.stream = stream
        self.position = 0

    def __iter__(self) -> Iterator[str]:
        for line in self.stream:
            self.position += len(line)
            if self.position == len(line) and line.startswith(_BOM):
                line = line[len(_BOM) :]
            yield line.decode("utf-8", "surrogateescape")


def open_lines(filesystem: FileSystem, path: str) -> io.BufferedReader:
    """Open a file for reading lines from its start."""
    return io.BufferedReader(filesystem.open_input_stream(path, compression=None), _BUFFER)


def read_bytes(filesystem: FileSystem, path: str, start: int, stop: int) -> io.BytesIO:
    """A range of a file's bytes."""
    with filesystem.open_input_file(path) as file:
        file.seek(start)
        return io.BytesIO(file.read(stop - start))


def divide_records(ends: Iterable[int], start: int, unit_rows: int) -> list[Range]:
    """Divide records into ranges of bytes.

    Args:
        ends: the position after each record.
        start: the position of the first record.
        unit_rows: maximum number of records per range.
    """
    ranges: list[Range] = []
    rows, end = 0, start
    for end in ends:
        rows += 1
        if rows == unit_rows:
            ranges.append(Range(start, end, rows))
            start, rows = end, 0
    if rows:
        ranges.append(Range(start, end, rows))
    return ranges


def rows_of_records(
    records: Sequence[Mapping[str, Any]], problems: dict[int, str], columns: Columns, render: Any = str
) -> Rows:
    """The rows of parsed records.

    Args:
        records: one mapping per row; empty for a row that could not be parsed.
        problems: by row, why it could not be parsed.
        columns: the columns to read.
        render: converts a kept value that is not a string and not None.
    """

    def kept(value: Any) -> str | None:
        if value is None:
            return None
        text = value if isinstance(value, str) else render(value)
        return text.encode("utf-8", "replace").decode()  # lone surrogates cannot be written

    table = {name: pa.array([kept(record.get(name)) for record in records], pa.string()) for name in columns.kept}
    pairs = None if columns.pair is None else [record.get(columns.pair) for record in records]
    return Rows([record.get(columns.text) for record in records], pairs, pa.table(table), problems)
