"""Mutual exclusion on filesystems without locks, by a file that records its holder and must be renewed."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyarrow.fs import FileSystem, FileType

_log = logging.getLogger(__name__)
LIFETIME = 120.0
"""Seconds after which a lease that was not renewed expires."""
RUN_LIFETIME = 60.0
""":data:`LIFETIME` of the leases of runs: how long the next start of a run waits after its process was killed."""


class Lease:
    """A lease file: its holder, and when it was renewed and expires.

    pyarrow has no conditional writes, so this is best effort: a holder reads the file before it writes it, and once more
    ``settle`` seconds after it acquired it. If the clocks of two machines differ by more than ``lifetime``, or a write takes
    longer than ``settle`` seconds, both may continue. What they write must allow that.

    Args:
        filesystem: the filesystem of the file.
        path: path of the file.
        lifetime: seconds after which a lease that was not renewed expires.
        settle: seconds between writing the file and reading its holder.
        poll: seconds between two checks of another process's lease.
        sleep: function that waits N seconds.
        now: function that returns the seconds since the epoch.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        path: str,
        lifetime: float = LIFETIME,
        settle: float = 0.5,
        poll: float = 2.0,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.filesystem, self.path = filesystem, path
        self.lifetime, self.settle, self.poll = lifetime, settle, poll
        self.sleep, self.now = sleep, now
        self.holder = uuid.uuid4().hex

    def acquire(self, wait: bool = True) -> bool:
        """Acquire the lease. If another process holds it, wait, or return False if ``wait`` is False."""
        logged = False
        while True:
            other = self._read()
            if other is None or self.now() > other["expires"]:
                self._write()
                self.sleep(self.settle)
                if self.holds():
                    return True
            elif not wait:
                return False
            if not logged:
                _log.warning("another process is writing (lease file %s); waiting for it", self.path)
                logged = True
            self.sleep(self.poll)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the acquired lease in a background thread, and release it when the block ends."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.lifetime / 4):
                try:
                    self.renew()
                except OSError as error:
                    _log.warning("cannot renew the lease %s (%s); trying again", self.path, error)

        keeper = threading.Thread(target=renew, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            try:
                self.release()
            except OSError as error:
                _log.warning("%s could not be removed (%s); it will expire", self.path, error)

    def renew(self) -> None:
        """Write the current time to the lease file."""
        if self.holds():
            self._write()
        else:
            _log.warning("another process has taken over the lease %s", self.path)

    def release(self) -> None:
        """Remove the lease file."""
        if self.holds():
            self.filesystem.delete_file(self.path)

    def holds(self) -> bool:
        """Whether no other process has acquired the lease meanwhile."""
        content = self._read()
        return content is not None and content["holder"] == self.holder

    def _read(self) -> dict[str, Any] | None:
        info = self.filesystem.get_file_info(self.path)
        if info.type != FileType.File:
            return None
        try:
            with self.filesystem.open_input_file(self.path) as stream:
                return dict(json.loads(stream.read()))
        except FileNotFoundError:  # released just now
            return None
        except ValueError:  # incomplete: it is being written, or its writer died
            return {"holder": "", "expires": (info.mtime.timestamp() if info.mtime else 0.0) + self.lifetime}

    def _write(self) -> None:
        now = self.now()
        content = {"holder": self.holder, "renewed": now, "expires": now + self.lifetime}
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(json.dumps(content).encode())
