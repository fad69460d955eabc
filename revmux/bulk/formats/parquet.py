"""Parquet files. Their footers list the row groups."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import parquet
from pyarrow.fs import FileSystem

from revmux.bulk.formats.base import Columns, Format, Range, Rows, divide_blocks, rows_of_table, take_rows

_BATCH_ROWS = 4096


class Parquet(Format):
    """Parquet. A row group that is larger than a unit is divided, and a unit decodes the rows before its own too."""

    def columns(self, filesystem: FileSystem, path: str) -> dict[str, pa.DataType]:
        """The schema of the footer."""
        schema = parquet.read_schema(path, filesystem=filesystem)
        return dict(zip(schema.names, schema.types))

    def divide(self, filesystem: FileSystem, path: str, unit_rows: int) -> list[Range]:
        """Ranges of row groups, from the footer."""
        footer = parquet.read_metadata(path, filesystem=filesystem)
        return divide_blocks((footer.row_group(index).num_rows for index in range(footer.num_row_groups)), unit_rows)

    def read(self, filesystem: FileSystem, path: str, part: Range, columns: Columns) -> Rows:
        """Read the rows in batches, so that memory does not grow with the row group."""
        # Without a buffer size or with pre_buffer, the reader would load whole row groups.
        with parquet.ParquetFile(path, filesystem=filesystem, pre_buffer=False, buffer_size=1 << 20) as file:
            groups: list[int] = []
            first = skip = 0
            for index in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(index).num_rows
                if first < part.stop and part.start < first + rows:
                    if not groups:
                        skip = part.start - first
                    groups.append(index)
                first += rows
            taken = take_rows(file.iter_batches(_BATCH_ROWS, groups, columns.read), skip, part.rows)
            schema = pa.schema([file.schema_arrow.field(name) for name in columns.read])
            return rows_of_table(pa.Table.from_batches(taken, schema.remove_metadata()), columns)
