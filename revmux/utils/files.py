"""Files and folders that exist whole or not at all, even after a killed process or a power loss.

Everything is written under a temporary name beside its target, flushed to the disk, and renamed. A folder that exists
already is exchanged with its successor in one step. Where the file system cannot exchange, such as NFS, the old folder is
moved aside first; :func:`recover_folder` moves it back if the process was killed before the new one took its place.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""How names of unfinished files and folders end."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; the file written there takes the place of ``path`` at the end of the body.

    Args:
        path: of the file; missing folders are made.

    Yields:
        The temporary path. If the body raises, its file is removed and ``path`` stays as it was.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_durably(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file through :func:`atomic_file`; text is encoded as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON through :func:`atomic_file`."""
    write_durably(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place at the end of the body.

    At every moment ``folder`` is the whole old folder or the whole new one, or, on a file system that cannot exchange
    folders, :func:`recover_folder` makes it so.

    Args:
        folder: replaced if it exists; missing parents are made.

    Yields:
        The temporary folder. If the body raises, it is removed and ``folder`` stays as it was.
    """
    folder = _without_link(folder)
    make_folder(folder.parent)
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what was written in vain, or what was replaced


def recover_folder(folder: Path) -> None:
    """Move a folder back that a killed process had moved aside; whoever opens an atomic folder calls this first."""
    folder = _without_link(folder)
    while not folder.exists() and (aside := _moved_aside(folder)):
        try:
            os.rename(aside[-1], folder)
        except FileNotFoundError:
            continue  # another process was faster
        except OSError:  # read-only, or the new folder has just taken its place
            return
        _sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that a process killed midway leaves no part of it under its name."""
    going = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):
        os.rename(folder, going)
        shutil.rmtree(going)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and flush their names to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")


def _without_link(folder: Path) -> Path:
    return folder.resolve() if folder.is_symlink() else folder


def _put(new: Path, folder: Path) -> None:
    """Give ``new`` the name ``folder``; what had that name is removed, or left under the name ``new``."""
    recover_folder(folder)
    while True:
        try:
            os.rename(new, folder)  # it is missing, or empty
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                recover_folder(folder)
                raise
        with suppress(FileNotFoundError):  # another process has just moved it aside
            if _exchange(new, folder):
                break
            _move_aside(folder)
    _sync(folder.parent)
    _remove_moved_aside(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or an old C library
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _move_aside(folder: Path) -> None:
    _remove_moved_aside(folder)
    os.rename(folder, folder.with_name(f".{folder.name}.old-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"))
    _sync(folder.parent)


def _moved_aside(folder: Path) -> list[Path]:
    prefix = f".{folder.name}.old-"
    with suppress(OSError):
        return sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix))
    return []


def _remove_moved_aside(folder: Path) -> None:
    aside = _moved_aside(folder)  # listed first: if the folder exists after that, it is none of these
    if folder.exists():
        for path in aside:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))
