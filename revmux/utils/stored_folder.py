"""Result folders in a storage that is a local folder or a URI: written completely, and read as local files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from revmux.errors import UserError
from revmux.utils.copies import is_uri
from revmux.utils.files import atomic_folder
from revmux.utils.place import BLOCK, Place
from revmux.utils.redact import error_line, without_passwords

LAST = ("adapter_config.json", "config.json", "plan.json")
"""Files that make a folder an adapter, a model or a plan. On an object store they are written last and removed first, so a
folder with one of them is complete."""


@contextmanager
def writing_folder(location: str) -> Iterator[Path]:
    """Context manager for a local folder whose files replace those at a location when the block ends.

    Args:
        location: a folder or URI. If the block raises, it is unchanged.

    Raises:
        UserError: the files cannot be written to the URI.
        OSError: the files cannot be written to the local folder.
    """
    if not is_uri(location):
        with atomic_folder(Path(location)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="revmux-") as folder:
        yield Path(folder)
        _upload(Path(folder), location)


def publish_folder(source: Path, location: str) -> None:
    """Replace the folder at a location by a copy of a local folder.

    Raises:
        UserError: see :func:`writing_folder`.
        OSError: see :func:`writing_folder`.
    """
    if is_uri(location):
        _upload(source, location)
        return
    with atomic_folder(Path(location)) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


@contextmanager
def reading_folder(location: str) -> Iterator[Path]:
    """Context manager for the files at a location: the folder itself, or a temporary copy of the files at a URI.

    Raises:
        UserError: the URI cannot be read.
    """
    if not is_uri(location):
        yield Path(location)
        return
    from pyarrow.fs import LocalFileSystem, copy_files

    place = Place.open(location)
    with tempfile.TemporaryDirectory(prefix="revmux-") as folder:
        try:
            copy_files(place.path, folder, source_filesystem=place.filesystem, destination_filesystem=LocalFileSystem())
        except OSError as error:
            raise UserError(f"cannot read {without_passwords(location)!r} ({error_line(error)})") from error
        yield Path(folder)


def write_json_at(location: str, content: Any) -> None:
    """Write indented JSON to a file, which is a path or URI, and is complete afterwards or unchanged.

    Raises:
        UserError: it cannot be written.
    """
    file = Place.open(location)
    folder, _, name = file.path.rpartition("/")
    Place(file.filesystem, folder).write(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _upload(source: Path, location: str) -> None:
    place = Place.open(location)
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    try:
        former = place.files_below()
        for name in sorted(former, key=lambda name: name not in LAST):
            if name in LAST or name not in names:
                place.remove_file(name)
        for name in sorted(names, key=lambda name: (name in LAST, name)):
            Place(place.filesystem, place.file(name).rpartition("/")[0]).create()
            with (source / name).open("rb") as file, place.filesystem.open_output_stream(place.file(name)) as stream:
                shutil.copyfileobj(file, stream, BLOCK)
    except OSError as error:
        raise UserError(
            f"cannot write to {without_passwords(location)!r} ({error_line(error)}); fix this and run the same command again"
        ) from error
