"""What a file format provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Columns:
    """The columns that a job reads.

    Attributes:
        text: column of the text.
        pair: column of the second text, or None.
        kept: columns to copy to the output, in the order of the output.
    """

    text: str
    pair: str | None
    kept: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """All columns, each once."""
        return list(dict.fromkeys([self.text, *([] if self.pair is None else [self.pair]), *self.kept]))


@dataclass(frozen=True)
class Range:
    """A range of a file's rows.

    Attributes:
        start: first row; in a text format, first byte.
        stop: end of the range, exclusive.
        rows: number of rows.
    """

    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Rows:
    """The rows of a range, in order.

    Attributes:
        texts: one value per row. A value that is not a string is a bad row.
        pairs: the second texts, or None.
        kept: the kept columns.
        problems: by row, why it could not be parsed.
    """

    texts: list[Any]
    pairs: list[Any] | None
    kept: pa.Table
    problems: dict[int, str]


class Format(ABC):
    """A file format. Instances have no state.

    Attributes:
        lacks_columns: whether a kept column may be missing in a file, where it is then null.
    """

    lacks_columns: ClassVar[bool] = False

    @abstractmethod
    def columns(self, filesystem: FileSystem, path: str) -> dict[str, pa.DataType]:
        """The columns of a file and their types in the output."""

    @abstractmethod
    def divide(self, filesystem: FileSystem, path: str, unit_rows: int) -> list[Range]:
        """Divide a file into ranges of at most ``unit_rows`` rows. A file without rows has no range."""

    @abstractmethod
    def read(self, filesystem: FileSystem, path: str, part: Range, columns: Columns) -> Rows:
        """Read one range."""


def divide_blocks(blocks: Iterable[int], unit_rows: int) -> list[Range]:
    """Divide consecutive blocks of rows, such as row groups. Small blocks are joined, and large ones are split evenly."""
    ranges: list[Range] = []
    start = stop = 0

    def close() -> None:
        nonlocal start
        if stop > start:
            ranges.append(Range(start, stop, stop - start))
        start = stop

    for rows in blocks:
        if stop - start + rows > unit_rows:
            close()
        parts = max(1, -(-rows // unit_rows))
        edges = [stop + rows * part // parts for part in range(1, parts + 1)]
        for edge in edges:
            stop = edge
            if parts > 1:
                close()
    close()
    return ranges


def rows_of_table(table: pa.Table, columns: Columns) -> Rows:
    """The rows of a table that contains the columns."""
    pairs = None if columns.pair is None else texts_of(table[columns.pair])
    return Rows(texts_of(table[columns.text]), pairs, table.select(list(columns.kept)), {})


def take_rows(batches: Iterable[pa.RecordBatch], skip: int, rows: int) -> list[pa.RecordBatch]:
    """The ``rows`` rows after the first ``skip`` rows of record batches."""
    taken: list[pa.RecordBatch] = []
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        piece = batch.slice(skip, rows)
        skip = 0
        rows -= piece.num_rows
        taken.append(piece)
        if not rows:
            break
    return taken


def texts_of(column: pa.ChunkedArray) -> list[Any]:
    """The values of a text column. Bytes that are not UTF-8 become lone surrogates, by which a bad row is recognized."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in values]
