"""Checks of labelled text that do not import pandas or datasets: that it exists, and that it has the columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from revmux.data.columns import find_columns
from revmux.data.config import BUILT_IN, SENTIMENT, SUFFIXES, DataConfig
from revmux.errors import UserError
from revmux.utils.copies import local_path
from revmux.utils.plugins import has_plugins


def check_source(config: DataConfig) -> None:
    """Check the path of a task's data and the columns in its header. Data on an object store is copied for it.

    The built-in tasks, hub data sets and files without a readable header are not checked.

    Args:
        config: the data settings.

    Raises:
        UserError: the file or folder cannot be found, or the header does not have the columns.
    """
    if config.source in BUILT_IN:
        return
    path = local_path(config.source)
    if path.is_dir():
        path = next((file for file in sorted(path.iterdir()) if file.stem == "train" and file.suffix in SUFFIXES), path)
    elif not path.exists() and _is_path(path) and not has_plugins("revmux.data_sources"):
        raise UserError(
            f"cannot find file or folder {config.source!r}; name an existing one, '{SENTIMENT}', or a hub data set"
        )
    columns = header(path) if path.is_file() else None
    if columns:
        find_columns(columns, config)


def _is_path(path: Path) -> bool:
    # A hub id is NAME or USER/NAME.
    return path.suffix in SUFFIXES or path.is_absolute() or path.parts[:1] == ("..",) or len(path.parts) > 2


def header(file: Path) -> list[str] | None:
    """The columns of a data file, from its first lines, or None if they cannot be determined."""
    try:
        return _HEADERS[file.suffix](file) if file.suffix in _HEADERS else None
    except (OSError, ValueError, csv.Error):
        return None


def _delimited(file: Path) -> list[str]:
    # Quotes in a TSV file are text, as in GLUE. The encoding skips a byte-order mark.
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if file.suffix == ".tsv" else csv.reader(lines)
        return next(rows, [])


def _json_lines(file: Path) -> list[str] | None:
    with file.open(encoding="utf-8-sig") as lines:
        first = json.loads(lines.readline())
    return list(first) if isinstance(first, dict) else None


def _parquet(file: Path) -> list[str]:
    from pyarrow import parquet  # imported only for this kind of file, since it takes 0.1 s

    return list(parquet.read_schema(file).names)


_HEADERS: dict[str, Callable[[Path], list[str] | None]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}
