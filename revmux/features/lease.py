"""Mutual exclusion on filesystems without locks: a file that names its holder and must be renewed."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from pyarrow.fs import FileSystem, FileType

_log = logging.getLogger(__name__)


class Lease:
    """A lease file.

    Object stores have no atomic creation, so this is a best effort: two processes that start within
    ``settle`` seconds of each other's write could both go on. They would then write equal files twice.

    Args:
        filesystem: where the file is.
        path: its path.
        lifetime: seconds after which a lease that was not renewed counts as left behind.
        settle: seconds between writing the file and reading who won.
        poll: seconds between two looks at another's lease.
        sleep: waits so many seconds.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        path: str,
        lifetime: float = 120.0,
        settle: float = 0.5,
        poll: float = 2.0,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.filesystem, self.path = filesystem, path
        self.lifetime, self.settle, self.poll = lifetime, settle, poll
        self.sleep, self.now = sleep, now
        self.holder = uuid.uuid4().hex
        self.renewed = 0.0

    def acquire(self, wait: bool = True) -> bool:
        """Take the lease, waiting for another's to end if told so; says whether it was taken."""
        told = False
        while True:
            other = self._read()
            if other is None or self.now() - other["renewed"] > self.lifetime:
                self._write()
                self.sleep(self.settle)
                if self._holds():
                    return True
            elif not wait:
                return False
            if not told:
                _log.info("another process is writing, says %s; waiting for it", self.path)
                told = True
            self.sleep(self.poll)

    def renew(self) -> None:
        """Say that the holder is alive; cheap to call often."""
        if self.now() - self.renewed < self.lifetime / 4:
            return
        if not self._holds():
            _log.warning("%s was taken by another process; both go on, and write the same files", self.path)
            self.renewed = self.now()
            return
        self._write()

    def release(self) -> None:
        """Give the lease back."""
        if self._holds():
            self.filesystem.delete_file(self.path)

    def _holds(self) -> bool:
        content = self._read()
        return content is not None and content["holder"] == self.holder

    def _read(self) -> dict[str, Any] | None:
        if self.filesystem.get_file_info(self.path).type != FileType.File:
            return None
        try:
            with self.filesystem.open_input_file(self.path) as stream:
                return dict(json.loads(stream.read()))
        except (FileNotFoundError, ValueError):  # released, or being written, just now
            return None

    def _write(self) -> None:
        self.renewed = self.now()
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(json.dumps({"holder": self.holder, "renewed": self.renewed}).encode())
