"""Local copies of files and folders on object stores, for libraries that open paths only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from revmux.errors import UserError
from revmux.utils.files import atomic_file, atomic_folder, make_folder, user_cache
from revmux.utils.object_store import open_uri
from revmux.utils.redact import error_line, without_passwords

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "hf", "file")
"""Schemes that pyarrow opens; ``fsspec+PROTOCOL`` are others."""
_WAIT_S = 3600


def is_uri(location: str) -> bool:
    """Whether a location is a URI that pyarrow opens, such as ``s3://bucket/folder``, and not a path or a name."""
    scheme, separator, _ = location.partition("://")
    return bool(separator) and (scheme in SCHEMES or scheme.startswith("fsspec+"))


def path_form(location: str) -> Path:
    """A location as a path whose name and suffix are those of the file or folder. A URI's path cannot be opened."""
    return Path(location.partition("?")[0] if is_uri(location) else location).expanduser()


def join_location(folder: str, name: str) -> str:
    """The location of a name below a folder or URI; an absolute path or a URI unchanged."""
    if "://" in name or os.path.isabs(name):
        return name
    path, mark, query = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def local_path(location: str) -> Path:
    """The path of a location on this machine, which for a URI is that of a copy.

    Raises:
        UserError: see :func:`local_copy`.
    """
    return local_copy(location) if is_uri(location) else Path(location).expanduser()


def local_copy(uri: str) -> Path:
    """Copy a file or folder to ``revmux/copies`` in the user's cache, unless the copy there has the same files.

    Files are compared by name, size and time. Processes that ask at once wait for one of them. A copy has the name of the
    original, and is complete or does not exist.

    Args:
        uri: URI that pyarrow opens.

    Raises:
        UserError: nothing is there, it cannot be opened or read, or the copy cannot be written.
    """
    import pyarrow as pa
    from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files

    filesystem, path = open_uri(uri)
    try:
        info = filesystem.get_file_info(path)
        is_folder = info.type == FileType.Directory
        found = filesystem.get_file_info(FileSelector(path, recursive=True)) if is_folder else [info]
        files = sorted((one.path, one.size, one.mtime_ns) for one in found if one.type == FileType.File)
        if not files:
            raise FileNotFoundError(f"there is nothing at {path}")
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {without_passwords(uri)!r} ({error_line(error)}); name an existing file or folder"
        ) from None
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    key = hashlib.sha256(repr((uri, files)).encode()).hexdigest()[:16]
    copy = Path(user_cache("copies")).expanduser() / key / PurePosixPath(path).name
    if copy.exists():
        return copy
    try:
        make_folder(copy.parent)
        with FileLock(f"{copy.parent}.lock", timeout=_WAIT_S):
            if not copy.exists():
                with (atomic_folder if is_folder else atomic_file)(copy) as temporary:
                    copy_files(
                        path,
                        str(temporary),
                        source_filesystem=filesystem,
                        destination_filesystem=LocalFileSystem(),
                    )
    except (OSError, pa.ArrowException, Timeout) as error:
        raise UserError(
            f"cannot copy {without_passwords(uri)!r} to {copy} ({error_line(error)}); free some space there, or name a writable folder in "
            "XDG_CACHE_HOME"
        ) from None
    return copy
