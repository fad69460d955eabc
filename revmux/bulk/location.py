"""The files of a job's input: a file, a folder, a glob, or a URI of any of these."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from revmux.bulk.config import BulkConfig
from revmux.bulk.formats import FORMATS
from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_MODELS
from revmux.utils.place import Place
from revmux.utils.redact import error_line, without_passwords

Config = TypeVar("Config", bound=BulkConfig)
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class InputFile:
    """One file of the input.

    Attributes:
        path: path in its filesystem.
        size: bytes.
        changed: time of the last change in nanoseconds.
    """

    path: str
    size: int
    changed: int


@dataclass(frozen=True)
class InputFiles:
    """All files of the input.

    Attributes:
        filesystem: where they are.
        files: sorted by path.
        ignored: paths of files in the folder with another suffix.
    """

    filesystem: FileSystem
    files: list[InputFile]
    ignored: list[str]


def with_absolute_paths(config: Config) -> Config:
    """The settings with absolute paths, since workers run in other folders."""
    model = config.model
    if model is not None and model not in EMBEDDED_MODELS and Path(model).expanduser().exists():
        model = absolute_location(model)
    return replace(config, input=absolute_location(config.input), output=absolute_location(config.output), model=model)


def absolute_location(location: str) -> str:
    """A local path as an absolute path; a URI unchanged."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def list_files(source: str) -> InputFiles:
    """List the files that a source names.

    Args:
        source: a file, folder or glob, on the local disk or as a URI.

    Raises:
        UserError: the URI cannot be opened or listed, nothing is there, or a file has an unknown suffix.
    """
    place, pattern = open_source(source)
    try:
        infos = _matches(place, pattern) if pattern else _named(place, source)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot list input {without_passwords(source)!r} ({error_line(error)}); check the location and its credentials"
        ) from None
    known: list[FileInfo] = []
    ignored: list[FileInfo] = []
    for info in sorted(infos, key=lambda info: info.path):
        (known if PurePosixPath(info.path).suffix in FORMATS else ignored).append(info)
    if not known:
        found = f"{ignored[0].path!r} is not a data file" if ignored else f"cannot find a file for input {source!r}"
        raise UserError(f"{found}; known suffixes: {', '.join(FORMATS)}; name a file, a folder or a glob of such files")
    if pattern and ignored:
        raise UserError(
            f"input {source!r} includes {ignored[0].path!r}; known suffixes: {', '.join(FORMATS)}; choose a narrower glob"
        )
    files = [InputFile(info.path, info.size or 0, info.mtime_ns or 0) for info in known]
    return InputFiles(place.filesystem, files, [info.path for info in ignored])


def check_apart(source: str, output: str) -> None:
    """Check that the output folder is not part of the input.

    Raises:
        UserError: the output is the input, or inside of it.
    """
    place, pattern = open_source(source)
    target = Place.open(output)
    if place.filesystem != target.filesystem:
        return
    inner, outer = PurePosixPath(target.path), PurePosixPath(place.path)
    if inner == outer or (outer in inner.parents and (not pattern or "**" in pattern)):
        raise UserError(f"output {output!r} is inside the input {source!r}; choose a folder outside of it")


def open_source(source: str) -> tuple[Place, str]:
    """Open the place before the first wildcard of a source.

    Returns:
        The place, and the pattern after it, which is empty without a wildcard.

    Raises:
        UserError: the URI cannot be opened.
    """
    scheme, separator, rest = source.rpartition("://")
    path, mark, query = rest.partition("?") if separator else (rest, "", "")
    parts = path.split("/")
    first = next((index for index, part in enumerate(parts) if _WILDCARD.search(part)), None)
    if first is None:
        return Place.open(source), ""
    return Place.open(f"{scheme}{separator}{'/'.join(parts[:first]) or '/'}{mark}{query}"), "/".join(parts[first:])


def _named(place: Place, source: str) -> list[FileInfo]:
    info = place.filesystem.get_file_info(place.path)
    if info.type == FileType.File:
        return [info]
    if info.type == FileType.NotFound:
        raise UserError(f"cannot find input {source!r}; name an existing file, folder, glob or URI")
    found = place.filesystem.get_file_info(FileSelector(place.path, recursive=True))
    return [item for item in found if item.type == FileType.File and not _is_hidden(item.path, place.path)]


def _matches(place: Place, pattern: str) -> list[FileInfo]:
    paths = ArrowFSWrapper(place.filesystem).glob(f"{place.path}/{pattern}")
    infos = place.filesystem.get_file_info(paths) if paths else []
    return [info for info in infos if info.type == FileType.File and not _is_hidden(info.path, place.path)]


def _is_hidden(path: str, folder: str) -> bool:
    """Whether a name below the folder starts with a dot or an underscore, as those of unfinished and metadata files."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).relative_to(folder).parts)
