"""Where a job writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.ray_internals import in_submitted_job
from revmux.errors import UserError

if TYPE_CHECKING:
    from revmux.features.config import StoreConfig


def absolute_path(path: str, setting: str) -> Path:
    """A path that results go to, as an absolute one.

    Args:
        path: as given.
        setting: what it was given as, for the message.

    Raises:
        UserError: a URI; or a relative path in a submitted job, which runs in a copy that is thrown away.
    """
    if "://" in path:
        raise UserError(f"{setting} {path!r} is a URI; mount what it names and give the folder, such as /mnt/revmux")
    place = Path(path).expanduser()
    if not place.is_absolute() and in_submitted_job():
        raise UserError(
            f"{setting} {path!r} is relative, but a submitted job runs in a copy that is thrown away; name an absolute "
            "folder that every node reaches, such as --storage /mnt/revmux"
        )
    return place.absolute()


def absolute_storage(storage: str) -> Path:
    """The storage folder, made where it is missing.

    Raises:
        UserError: as :func:`absolute_path`, or it cannot be made or written.
    """
    folder = absolute_path(storage, "storage")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except OSError as error:
        raise UserError(f"storage {storage!r} cannot be written ({error}); name a folder that can") from None
    return folder


def store_in(storage: Path, store: StoreConfig) -> StoreConfig:
    """A job's feature store with its root spelled out, since workers run in folders of their own.

    By default the store is in the storage folder, which every node reaches, so that the machines of a cluster share
    what each of them computed. The user's cache is on one machine only.

    Args:
        storage: of the job, absolute.
        store: as given.

    Raises:
        UserError: as :func:`absolute_path`, for a relative root.
    """
    root = store.root or str(storage / "features")
    return replace(store, root=root if "://" in root else str(absolute_path(root, "--store.root")))
