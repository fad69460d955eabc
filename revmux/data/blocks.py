"""Data sets that are larger than memory: read in blocks, and written block by block to memory-mapped files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from revmux.errors import UserError
from revmux.utils.files import atomic_file, user_cache
from revmux.utils.mapped_files import release_files

ROWS_AT_ONCE = 10_000
"""Rows per block."""
IN_MEMORY = 100_000
"""Number of rows up to which a split is kept in memory."""
_BLOCKS_PER_RELEASE = 8


def blocks(split: Dataset, size: int = ROWS_AT_ONCE) -> Iterator[pa.Table]:
    """The rows of a split in blocks. Reading a memory-mapped split keeps only some blocks in memory.

    Args:
        split: the rows.
        size: maximum number of rows per block.
    """
    files = [os.path.realpath(file["filename"]) for file in split.cache_files]
    for number, block in enumerate(split.with_format("arrow").iter(size)):
        yield block.combine_chunks()  # rows that were selected one by one are views of the file
        if number % _BLOCKS_PER_RELEASE == _BLOCKS_PER_RELEASE - 1:
            release_files(files)
    release_files(files)


def stored(key: str, rows: Iterator[pa.Table]) -> Dataset:
    """A memory-mapped split, which is written first unless an earlier process has written it.

    Args:
        key: a hash of everything that determines the rows; name of the file in ``revmux/data`` of the user's cache folder.
        rows: the rows in blocks of the same columns. They are read only if the file does not exist.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(user_cache("data")).expanduser() / f"{key}.arrow"
    if not path.is_file():
        try:
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                first = next(rows)
                with pa.ipc.new_stream(file, first.schema) as writer:
                    writer.write_table(first)
                    for block in rows:
                        writer.write_table(block)
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error}); free some space there, or set XDG_CACHE_HOME to another folder"
            ) from None
    split: Dataset = Dataset.from_file(str(path))
    release_files([os.path.realpath(path)])  # opening reads the header of every block
    return split
