"""The user's own files: CSV, TSV, JSON lines, Parquet and Arrow, or a folder of them in GLUE's layout."""

from __future__ import annotations

import csv
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset

from revmux.data.blocks import ROWS_AT_ONCE, stored
from revmux.data.config import SENTIMENT, SUFFIXES, DataConfig
from revmux.data.sources.base import SOURCES, Source
from revmux.errors import UserError
from revmux.utils.copies import is_uri, local_path, path_form
from revmux.utils.redact import error_line

IN_MEMORY_BYTES = 32 * 2**20
"""Size up to which a CSV or TSV file is read into memory. A larger one is converted once and memory-mapped."""


@SOURCES.register("file")
class FileSource(Source):
    """One file, to be split into train, selection and test."""

    def claims(self, source: str) -> bool:
        """Whether ``source`` is a file, or has the form of a path or URI and is not a folder."""
        path = path_form(source)
        named_as_path = path.suffix in SUFFIXES or path.is_absolute() or source.startswith((".", "~"))
        return path.is_file() or (named_as_path and not path.is_dir())

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """All rows as the split ``all``."""
        path = local_path(config.source)
        if not path.is_file():
            raise UserError(
                f"cannot find file or folder {config.source!r}; name an existing one, '{SENTIMENT}', or a hub data set"
            )
        return {"all": read_file(path)}

    def name(self, config: DataConfig) -> str:
        """The file name without its folders, since folders differ between machines."""
        return path_form(config.source).absolute().name


@SOURCES.register("folder")
class FolderSource(Source):
    """A folder with the files train and dev, validation or test."""

    def claims(self, source: str) -> bool:
        """Whether ``source`` is an existing folder, or a URI without the suffix of a file."""
        return path_form(source).suffix not in SUFFIXES if is_uri(source) else Path(source).expanduser().is_dir()

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits, named after their files."""
        folder = local_path(config.source)
        found = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
        if "train" not in found or not {"dev", "validation", "test"} & set(found):
            raise UserError(
                f"folder {config.source!r} contains {sorted(found) or 'no data files'}; add files named train and dev (or "
                f"test), with one of the suffixes {', '.join(SUFFIXES)}"
            )
        return {name: read_file(found[name]) for name in ("train", "dev", "validation", "test") if name in found}

    def name(self, config: DataConfig) -> str:
        """The folder name without its parents, since parents differ between machines."""
        return path_form(config.source).absolute().name


def file_digest(file: Path) -> str:
    """Hash of a file's content, which is read in blocks."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(file.suffix.encode(), digest_size=16)).hexdigest()


def _delimited(file: Path) -> Iterator[pa.Table]:
    """The rows of a CSV or TSV file in blocks; all values are text."""
    # Quotes in a TSV file are text, as in GLUE. The encoding skips a byte-order mark.
    dialect: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    with warnings.catch_warnings():
        # A row that is longer than the header is an error, since columns would shift or values would be lost.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frames = pd.read_csv(
            file,
            dtype=str,
            index_col=False,
            keep_default_na=False,
            encoding="utf-8-sig",
            chunksize=ROWS_AT_ONCE,
            **dialect,
        )
        with frames:
            for frame in frames:
                names = [str(name) for name in frame.columns]
                yield pa.table([pa.array(frame[name], pa.string()) for name in frame.columns], names=names)


def read_file(file: Path) -> Dataset:
    """The rows of one file.

    Raises:
        UserError: the suffix is unknown, or the file cannot be parsed.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"{str(file)!r} ends in {file.suffix!r}; known: {', '.join(SUFFIXES)}; convert it to one of these"
        )
    try:
        if file.suffix in (".csv", ".tsv"):
            if file.stat().st_size > IN_MEMORY_BYTES:
                return stored(f"rows-{file_digest(file)}", _delimited(file))
            return Dataset(pa.concat_tables(_delimited(file)))
        if file.suffix == ".parquet":
            return Dataset.from_parquet(str(file))
        if file.suffix == ".arrow":
            return Dataset.from_file(str(file))
        return Dataset.from_json(str(file))
    except Exception as error:
        reason = f"{type(error).__name__}: {error_line(error)}"
        raise UserError(f"cannot read {str(file)!r} ({reason}); fix the file or name another") from None
