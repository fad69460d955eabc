"""Where a job writes."""

from __future__ import annotations

from pathlib import Path

from ray_jobs.ray_internals import in_submitted_job
from revmux.errors import UserError


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
