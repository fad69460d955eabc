"""File formats, by suffix. Each divides a file into ranges of rows and reads one range."""

from __future__ import annotations

from pathlib import PurePosixPath

from revmux.bulk.formats.arrow import Arrow
from revmux.bulk.formats.base import Columns, Format, Range, Rows
from revmux.bulk.formats.delimited import Delimited
from revmux.bulk.formats.json_lines import JsonLines
from revmux.bulk.formats.parquet import Parquet

__all__ = ["FORMATS", "Columns", "Format", "Range", "Rows", "format_of"]

FORMATS: dict[str, Format] = {
    ".parquet": Parquet(),
    ".arrow": Arrow(),
    ".csv": Delimited(","),
    ".tsv": Delimited("\t"),
    ".jsonl": JsonLines(),
    ".json": JsonLines(),
}


def format_of(path: str) -> Format:
    """The format of a file with a known suffix."""
    return FORMATS[PurePosixPath(path).suffix]
