"""Where a job writes: the storage, a folder or a URI that all nodes reach, and files of this machine alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.ray_internals import in_submitted_job
from revmux.errors import UserError
from revmux.utils.copies import SCHEMES, is_uri, join_location
from revmux.utils.files import user_cache
from revmux.utils.redact import error_line, without_passwords

if TYPE_CHECKING:
    from revmux.features.config import StoreConfig


def absolute_path(path: str, setting: str) -> Path:
    """Make an output path absolute.

    Args:
        path: the path as the user gave it.
        setting: name of the setting, for the error message.

    Raises:
        UserError: ``path`` is a URI, or it is relative in a submitted job, whose working directory is temporary.
    """
    if "://" in path:
        raise UserError(f"{setting} {without_passwords(path)!r} is a URI, but must be a path, such as /mnt/revmux")
    expanded = Path(path).expanduser()
    if not expanded.is_absolute() and in_submitted_job():
        raise UserError(
            f"{setting} {path!r} is relative, but the working directory of a submitted job is temporary; choose an absolute "
            "path that every node reaches, such as --storage /mnt/revmux, or a URI, such as --storage s3://bucket/runs"
        )
    return expanded.absolute()


def absolute_location(location: str, setting: str) -> str:
    """Make an output location absolute: a URI that pyarrow opens is unchanged, a path becomes absolute.

    Raises:
        UserError: see :func:`absolute_path`; or the URI's scheme is unknown.
    """
    if is_uri(location):
        return location
    if "://" in location:
        raise UserError(
            f"{setting} {without_passwords(location)!r} has an unknown scheme; choose a path, or a URI with "
            f"{', '.join(SCHEMES)} or fsspec+PROTOCOL"
        )
    return str(absolute_path(location, setting))


def absolute_storage(storage: str) -> str:
    """Make the storage's location absolute, and check that it can be written.

    Raises:
        UserError: see :func:`absolute_location`; or it cannot be created or written.
    """
    location = absolute_location(storage, "storage")
    import pyarrow as pa

    from revmux.utils.place import Place

    try:
        if is_uri(location):
            place = Place.open(location)
            place.filesystem.create_dir(place.path, recursive=True)
        else:
            Path(location).mkdir(parents=True, exist_ok=True)
            place = Place.open(location)
        place.put(".write-test", b"")
        place.remove_file(".write-test")
    except (OSError, pa.ArrowException) as error:  # the latter from Azure
        raise UserError(
            f"storage {without_passwords(storage)!r} cannot be written ({error_line(error)}); choose a writable folder or URI"
        ) from None
    return location


def recording_storage(storage: str, tracking_uri: str | None) -> str:
    """:func:`absolute_storage` of a job that records its run in MLflow.

    Raises:
        UserError: see :func:`absolute_storage`; or the storage is a URI, but MLflow's default database is a file.
    """
    if is_uri(storage) and tracking_uri is None:
        raise UserError(
            f"storage {without_passwords(storage)!r} is a URI, but MLflow's default database is a file; name a "
            "server that all nodes reach, such as --tracking.uri http://mlflow.internal:5000"
        )
    return absolute_storage(storage)


def own_folder(storage: str | Path) -> Path:
    """The folder of this machine's own files: the storage itself, or for a URI one in the user's cache."""
    location = str(storage)
    if not is_uri(location):
        return Path(location)
    key = hashlib.sha256(location.encode()).hexdigest()[:16]
    return Path(user_cache("storage")).expanduser() / key


def store_in(storage: str | Path, store: StoreConfig) -> StoreConfig:
    """The store's settings with an absolute root, since workers run in other working directories.

    By default the store is in the storage, which every node reaches, so that all machines of a cluster share computed
    features. The user's cache folder exists on one machine only.

    Args:
        storage: absolute storage of the job.
        store: settings as the user gave them.

    Raises:
        UserError: see :func:`absolute_path`; for a relative root.
    """
    root = store.root or join_location(str(storage), "features")
    return replace(store, root=root if "://" in root else str(absolute_path(root, "--store.root")))
