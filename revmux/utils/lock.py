"""A lock across processes, on the local disk and on other filesystems."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pyarrow.fs import FileSystem, LocalFileSystem

from revmux.errors import UserError
from revmux.utils.lease import LIFETIME, Lease

_log = logging.getLogger(__name__)


@contextmanager
def exclusive(
    filesystem: FileSystem, path: str, wait: bool = True, lifetime: float = LIFETIME
) -> Iterator[Callable[[], bool]]:
    """Hold a lock across processes: a file lock if local, otherwise a lease file.

    Args:
        filesystem: the filesystem of the lock file.
        path: path of the lock file.
        wait: whether to wait if another process holds the lock.
        lifetime: seconds after which the lease of a process that was killed expires.

    Yields:
        A function that returns whether no other process has acquired the lock meanwhile.

    Raises:
        UserError: another process holds the lock and ``wait`` is False.
    """
    busy = UserError(f"{path}: another process is writing there; wait until it has finished")
    if not isinstance(filesystem, LocalFileSystem):
        lease = Lease(filesystem, path, lifetime)
        if not lease.acquire(wait):
            raise busy
        with lease.kept():
            yield lease.holds
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise busy from None
        _log.warning("another process is writing %s; waiting for it", path)
        lock.acquire()
    try:
        yield lambda: True
    finally:
        lock.release()
