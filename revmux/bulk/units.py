"""Units of work: ranges of the rows of the input files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa
from pyarrow.fs import FileSystem

from revmux.bulk.config import BulkConfig
from revmux.bulk.formats import Columns, Range, format_of
from revmux.bulk.location import InputFiles, check_apart, list_files
from revmux.data.columns import find_text_columns
from revmux.errors import UserError
from revmux.utils.redact import error_line

ADDED_COLUMNS = ("label", "score", "scores", "width", "method", "stage", "fell_back", "error")
"""Columns that a job adds to the kept ones, in this order; ``scores`` only if all scores are written."""
_LISTING_THREADS = 16


@dataclass(frozen=True)
class Unit:
    """One unit of work, which becomes one output file.

    Attributes:
        number: position in the input, from 0.
        file: path in the input's filesystem.
        first_row: number of its first row in the file.
        part: its range of the file.
    """

    number: int
    file: str
    first_row: int
    part: Range

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.part.rows

    def __str__(self) -> str:
        return f"rows {self.first_row:,} to {self.first_row + self.rows - 1:,} of {self.file}"


@dataclass(frozen=True)
class Work:
    """All units of a job.

    Attributes:
        units: in the order of the input.
        columns: the columns that they read.
        types: types of the kept columns in the output.
        digest: hash of the names, sizes and times of change of all input files.
        files: number of input files.
        ignored: files in the input folder that are no data files.
    """

    units: list[Unit]
    columns: Columns
    types: dict[str, pa.DataType]
    digest: str
    files: int
    ignored: list[str]

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return sum(unit.rows for unit in self.units)


def list_work(config: BulkConfig) -> Work:
    """List the units of a job. Of Parquet files, only the footers are read.

    Raises:
        UserError: the input has no file, a file cannot be read or has not the columns, or the output is inside the input.
    """
    check_apart(config.input, config.output)
    found = list_files(config.input)
    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        schemas = list(threads.map(lambda file: _columns_of(found.filesystem, file.path), found.files))
        columns, types = _choose_columns(config, found, schemas)
        paths = [file.path for file, schema in zip(found.files, schemas) if schema]
        divided = list(threads.map(lambda path: _divide(found.filesystem, path, config.unit_rows), paths))
    units: list[Unit] = []
    for path, parts in zip(paths, divided):
        first = 0
        for part in parts:
            units.append(Unit(len(units), path, first, part))
            first += part.rows
    if not units:
        raise UserError(f"input {config.input!r} has no rows in {len(found.files)} files; name files with rows")
    digest = hashlib.sha256(repr([asdict(file) for file in found.files]).encode()).hexdigest()
    return Work(units, columns, types, digest, len(found.files), found.ignored)


def _choose_columns(
    config: BulkConfig, found: InputFiles, schemas: Sequence[dict[str, pa.DataType]]
) -> tuple[Columns, dict[str, pa.DataType]]:
    """The columns that the job reads, and the types of the kept ones."""
    first = next((index for index, schema in enumerate(schemas) if schema), None)
    if first is None:
        raise UserError(f"input {config.input!r} has no rows in {len(found.files)} files; name files with rows")
    path, schema = found.files[first].path, schemas[first]
    text, pair = find_text_columns(list(schema), config.text_column, config.pair_column, path)
    kept = list(schema) if config.keep_columns is None else config.keep_columns
    columns = Columns(text, pair, tuple(dict.fromkeys(kept)))
    for file, own in zip(found.files, schemas):
        if own:
            _check_schema(columns, own, schema, file.path, path)
    added = {config.column_prefix + name for name in ADDED_COLUMNS}
    if clash := [name for name in columns.kept if name in added]:
        raise UserError(
            f"input column {clash[0]!r} has the name of an output column; choose --column_prefix, such as predicted_, or "
            "list other --keep_columns"
        )
    return columns, {name: schema[name] for name in columns.kept}


def _check_schema(
    columns: Columns, own: dict[str, pa.DataType], first: dict[str, pa.DataType], path: str, first_path: str
) -> None:
    texts = [columns.text, *([] if columns.pair is None else [columns.pair])]
    for name in texts if format_of(path).lacks_columns else columns.read:
        if name not in own:
            raise UserError(f"{path!r} has no column {name!r}; its columns: {', '.join(own)}; name one of these")
    for text in texts:
        if not _is_text(own[text]):
            raise UserError(f"column {text!r} of {path!r} is {own[text]}, not text; name a text column")
    for name in columns.kept:
        if own.get(name, first[name]) != first[name]:
            raise UserError(
                f"column {name!r} is {own[name]} in {path!r}, but {first[name]} in {first_path!r}; convert one of them, or "
                "list other --keep_columns"
            )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    others = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    return any(check(kind) for check in (*text, *others))


def _columns_of(filesystem: FileSystem, path: str) -> dict[str, pa.DataType]:
    try:
        return format_of(path).columns(filesystem, path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _divide(filesystem: FileSystem, path: str, unit_rows: int) -> list[Range]:
    try:
        return format_of(path).divide(filesystem, path, unit_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"cannot read {path!r} ({error_line(error)}); fix the file, or choose a glob without it")
