"""Files of the user's own: CSV, TSV, JSON lines, Parquet and Arrow, or a folder of them in GLUE's layout."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from revmux.data.config import EMBEDDED_TASK, SUFFIXES, DataConfig
from revmux.data.sources.base import SOURCES, Source
from revmux.errors import UserError


@SOURCES.register("file")
class FileSource(Source):
    """One file, which is split into train, selection and test."""

    def claims(self, source: str) -> bool:
        """A file, or a name that can only be that of a missing file or folder."""
        path = Path(source).expanduser()
        named_as_path = path.suffix in SUFFIXES or path.is_absolute() or source.startswith((".", "~"))
        return path.is_file() or (named_as_path and not path.is_dir())

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """All rows as the split ``all``."""
        path = Path(config.source).expanduser()
        if not path.is_file():
            raise UserError(
                f"no file or folder {config.source!r}; name an existing one, '{EMBEDDED_TASK}', or a hub data set"
            )
        return {"all": read_file(path)}

    def name(self, config: DataConfig) -> str:
        """The name of the file without its folders, which differ between machines."""
        return Path(config.source).expanduser().absolute().name


@SOURCES.register("folder")
class FolderSource(Source):
    """A folder with the files train and dev, validation or test."""

    def claims(self, source: str) -> bool:
        """An existing folder."""
        return Path(source).expanduser().is_dir()

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits by the names of their files."""
        folder = Path(config.source).expanduser()
        found = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
        if "train" not in found or not {"dev", "validation", "test"} & set(found):
            raise UserError(
                f"folder {str(folder)!r} holds {sorted(found) or 'no data files'}; it needs train and dev (or test) as "
                f"one of {', '.join(SUFFIXES)}"
            )
        return {name: read_file(found[name]) for name in ("train", "dev", "validation", "test") if name in found}

    def name(self, config: DataConfig) -> str:
        """The name of the folder without its parents, which differ between machines."""
        return Path(config.source).expanduser().absolute().name


def read_file(file: Path) -> Dataset:
    """The rows of one file.

    Raises:
        UserError: an unknown suffix, or a file that cannot be parsed.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"{str(file)!r} ends in {file.suffix!r}; known: {', '.join(SUFFIXES)}; convert it to one of these"
        )
    try:
        if file.suffix in (".csv", ".tsv"):
            # In a TSV quotes are text, as in GLUE; a byte-order mark is not.
            dialect: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
            with warnings.catch_warnings():
                # Rows longer than the header: columns would shift, or values would be lost.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                frame = pd.read_csv(
                    file, dtype=str, index_col=False, keep_default_na=False, encoding="utf-8-sig", **dialect
                )
            return Dataset.from_pandas(frame, preserve_index=False)
        if file.suffix == ".parquet":
            return Dataset.from_parquet(str(file))
        if file.suffix == ".arrow":
            return Dataset.from_file(str(file))
        return Dataset.from_json(str(file))
    except Exception as error:
        raise UserError(f"cannot read {str(file)!r}: {type(error).__name__}: {str(error).splitlines()[0]}") from None
