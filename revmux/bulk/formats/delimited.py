"""CSV and TSV files with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem

from revmux.bulk.formats.base import Columns, Format, Range, Rows
from revmux.bulk.formats.lines import ByteLines, divide_records, open_lines, read_bytes, rows_of_records
from revmux.errors import UserError

csv.field_size_limit(1 << 24)  # the default refuses long texts; a limit finds a quote that is never closed


class Delimited(Format):
    """CSV or TSV. All columns are text, and blank lines are no rows, as in the training data.

    The whole file is read once to find where records start, since a quoted field may contain line breaks.

    Args:
        delimiter: a comma, or a tab. In TSV, quotes are part of the text.
    """

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter

    def columns(self, filesystem: FileSystem, path: str) -> dict[str, pa.DataType]:
        """The names in the header.

        Raises:
            UserError: two columns have the same name.
        """
        with open_lines(filesystem, path) as stream:
            names = self._header(ByteLines(stream))
        for place, name in enumerate(names):
            if name in names[:place]:
                raise UserError(
                    f"columns {names.index(name) + 1} and {place + 1} of {path!r} are both named {name!r}; rename one in the header"
                )
        return dict.fromkeys(names, pa.string())

    def divide(self, filesystem: FileSystem, path: str, unit_rows: int) -> list[Range]:
        """Ranges of bytes that start and end between records."""
        with open_lines(filesystem, path) as stream:
            lines = ByteLines(stream)
            self._header(lines)
            start = lines.position

            def ends() -> Iterator[int]:
                for record in self._records(lines, path):
                    if record:
                        yield lines.position

            return divide_records(ends(), start, unit_rows)

    def read(self, filesystem: FileSystem, path: str, part: Range, columns: Columns) -> Rows:
        """Parse the records of a range. A record with another number of fields than the header is a bad row."""
        header = list(self.columns(filesystem, path))
        records: list[Mapping[str, Any]] = []
        problems: dict[int, str] = {}
        for fields in self._records(ByteLines(read_bytes(filesystem, path, part.start, part.stop)), path):
            if not fields:
                continue
            if len(fields) != len(header):
                problems[len(records)] = f"the row has {len(fields)} fields, but the header has {len(header)}"
            records.append(dict(zip(header, fields)))
        return rows_of_records(records, problems, columns)

    def _header(self, lines: ByteLines) -> list[str]:
        return next(self._reader(lines), [])

    def _records(self, lines: ByteLines, path: str) -> Iterator[list[str]]:
        try:
            yield from self._reader(lines)
        except csv.Error as error:
            raise UserError(
                f"cannot read {path!r} ({error}, before byte {lines.position} of this range); a quote may not be closed; "
                "fix the file"
            ) from None

    def _reader(self, lines: ByteLines) -> Iterator[list[str]]:
        if self.delimiter == "\t":
            return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return csv.reader(lines)
