"""Atomic writes: a file or folder exists completely or not at all, even after a killed process or a power loss.

Content is written under a temporary name next to its target, flushed to disk, and renamed. An existing folder is
exchanged with its replacement in one step. On file systems that cannot exchange folders, such as NFS, the old folder is
moved aside first; :func:`recover_folder` moves it back if the process was killed before the rename.
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
"""Suffix of unfinished files and folders."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context manager for a temporary file that replaces ``path`` when the block ends.

    Args:
        path: the target file. Missing parent folders are created.

    Yields:
        The temporary path. If the block raises, the temporary file is removed and ``path`` is unchanged.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        yield temporary
        publish_file(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def publish_file(temporary: Path, path: Path) -> None:
    """Flush a finished file to disk and move it to its final path in the same folder."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write_durably(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file through :func:`atomic_file`; text is encoded as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON through :func:`atomic_file`."""
    write_durably(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager for a temporary folder that replaces ``folder`` when the block ends.

    At any time, ``folder`` is either the complete old folder or the complete new one. On a file system that cannot
    exchange folders, this holds after :func:`recover_folder`.

    Args:
        folder: the target folder, replaced if it exists. Missing parents are created.

    Yields:
        The temporary folder. If the block raises, it is removed and ``folder`` is unchanged.
    """
    folder = _without_link(folder)
    make_folder(folder.parent)
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the unfinished folder, or the one that was replaced


def recover_folder(folder: Path) -> None:
    """Restore a folder that a killed process had moved aside. Call this before opening an atomic folder."""
    folder = _without_link(folder)
    while not folder.exists() and (aside := _moved_aside(folder)):
        try:
            os.rename(aside[-1], folder)
        except FileNotFoundError:
            continue  # another process restored it first
        except OSError:  # the parent is read-only, or a new folder was just put in place
            return
        _sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, no partial folder is left under the original name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def user_cache(name: str) -> str:
    """``revmux/NAME`` in the user's cache folder, as XDG_CACHE_HOME names it. ``~`` is not expanded."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "revmux", name)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and flush their directory entries to disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")


def _without_link(folder: Path) -> Path:
    return folder.resolve() if folder.is_symlink() else folder


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``. An existing folder is removed, or left under the name ``new``."""
    recover_folder(folder)
    while True:
        try:
            os.rename(new, folder)  # works if the folder is missing or empty
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
    """Exchange the names of two folders atomically. Returns False if the system does not support this."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
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
    aside = _moved_aside(folder)  # listed before the check, so that a folder that exists is not in the list
    if folder.exists():
        for path in aside:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))
