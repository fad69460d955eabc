"""Absolute paths of the folders that a job writes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.ray_internals import in_submitted_job
from revmux.errors import UserError

if TYPE_CHECKING:
    from revmux.features.config import StoreConfig


def absolute_path(path: str, setting: str) -> Path:
    """Make an output path absolute.

    Args:
        path: the path as the user gave it.
        setting: name of the setting, for the error message.

    Raises:
        UserError: ``path`` is a URI, or it is relative in a submitted job, whose working folder is temporary.
    """
    if "://" in path:
        raise UserError(
            f"{setting} {path!r} is a URI, but results need a file system with locks and renames; choose a folder, which all "
            "nodes of a cluster reach, such as /mnt/revmux"
        )
    expanded = Path(path).expanduser()
    if not expanded.is_absolute() and in_submitted_job():
        raise UserError(
            f"{setting} {path!r} is relative, but the working folder of a submitted job is temporary; choose an absolute "
            "path that every node reaches, such as --storage /mnt/revmux"
        )
    return expanded.absolute()


def absolute_storage(storage: str) -> Path:
    """Make the storage folder's path absolute, and create the folder if it is missing.

    Raises:
        UserError: see :func:`absolute_path`; or the folder cannot be created or written.
    """
    folder = absolute_path(storage, "storage")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except OSError as error:
        raise UserError(f"storage {storage!r} cannot be written ({error}); choose a writable folder") from None
    return folder


def store_in(storage: Path, store: StoreConfig) -> StoreConfig:
    """The store's settings with an absolute root, since workers run in other working folders.

    By default the store is in the storage folder, which every node reaches, so that all machines of a cluster share
    computed features. The user's cache folder exists on one machine only.

    Args:
        storage: absolute storage folder of the job.
        store: settings as the user gave them.

    Raises:
        UserError: see :func:`absolute_path`; for a relative root.
    """
    root = store.root or str(storage / "features")
    return replace(store, root=root if "://" in root else str(absolute_path(root, "--store.root")))
