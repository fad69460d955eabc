"""JSON lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem

from revmux.bulk.formats.base import Columns, Format, Range, Rows
from revmux.bulk.formats.lines import ByteLines, divide_records, open_lines, read_bytes, rows_of_records
from revmux.errors import UserError

OBJECTS = 1000
"""First objects of a file in which its keys are looked up."""


class JsonLines(Format):
    """JSON lines. Kept values that are no strings are written as JSON, and blank lines are no rows.

    The whole file is read once to find the lines.
    """

    lacks_columns = True

    def columns(self, filesystem: FileSystem, path: str) -> dict[str, pa.DataType]:
        """The keys of the first objects, in the order in which they occur. An object may lack keys.

        Raises:
            UserError: the file is one JSON array.
        """
        found: dict[str, pa.DataType] = {}
        with open_lines(filesystem, path) as stream:
            objects = 0
            for line in ByteLines(stream):
                if not objects and line.lstrip().startswith("["):
                    raise UserError(
                        f"{path!r} starts with a JSON array; known: one object per line; convert it to JSON lines"
                    )
                record, _ = _parse(line)
                found |= dict.fromkeys(record, pa.string())
                objects += bool(record)
                if objects == OBJECTS:
                    break
        return found

    def divide(self, filesystem: FileSystem, path: str, unit_rows: int) -> list[Range]:
        """Ranges of bytes that start and end between lines."""
        with open_lines(filesystem, path) as stream:
            lines = ByteLines(stream)

            def ends() -> Iterator[int]:
                for line in lines:
                    if not line.isspace():
                        yield lines.position

            return divide_records(ends(), 0, unit_rows)

    def read(self, filesystem: FileSystem, path: str, part: Range, columns: Columns) -> Rows:
        """Parse the lines of a range. A line that is no JSON object is a bad row."""
        records: list[Mapping[str, Any]] = []
        problems: dict[int, str] = {}
        for line in ByteLines(read_bytes(filesystem, path, part.start, part.stop)):
            if line.isspace():
                continue
            record, problem = _parse(line)
            if problem:
                problems[len(records)] = problem
            records.append(record)
        return rows_of_records(records, problems, columns, json.dumps)


def _parse(line: str) -> tuple[dict[str, Any], str]:
    """The object on a line; or an empty one, and why there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not JSON ({error})"
    return (record, "") if isinstance(record, dict) else ({}, "the line is not a JSON object")
