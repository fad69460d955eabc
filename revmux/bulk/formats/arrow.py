"""Arrow IPC files and streams, such as those of the datasets library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import ipc
from pyarrow.fs import FileSystem, LocalFileSystem

from revmux.bulk.formats.base import Columns, Format, Range, Rows, divide_blocks, rows_of_table, take_rows


class Arrow(Format):
    """Arrow IPC. Record batches are counted by reading the file; local files are memory-mapped, so this is cheap."""

    def columns(self, filesystem: FileSystem, path: str) -> dict[str, pa.DataType]:
        """The schema at the start of the file."""
        with _opened(filesystem, path) as (schema, _):
            return dict(zip(schema.names, schema.types))

    def divide(self, filesystem: FileSystem, path: str, unit_rows: int) -> list[Range]:
        """Ranges of record batches."""
        with _opened(filesystem, path) as (_, batches):
            return divide_blocks((batch.num_rows for batch in batches), unit_rows)

    def read(self, filesystem: FileSystem, path: str, part: Range, columns: Columns) -> Rows:
        """Read the rows of a range."""
        with _opened(filesystem, path) as (schema, batches):
            taken = pa.Table.from_batches(take_rows(batches, part.start, part.rows), schema)
            return rows_of_table(taken.select(columns.read).replace_schema_metadata(None), columns)


@contextmanager
def _opened(filesystem: FileSystem, path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema of a file or stream, and its record batches."""
    local = isinstance(filesystem, LocalFileSystem)
    with pa.memory_map(path) if local else filesystem.open_input_file(path) as source:
        try:
            reader = ipc.open_file(source)
        except pa.ArrowInvalid:  # not a file but a stream
            source.seek(0)
            stream = ipc.open_stream(source)
            yield stream.schema, iter(stream)
        else:
            yield reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
