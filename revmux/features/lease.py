"""Mutual exclusion on filesystems without locks: a file that names its holder and must be renewed."""

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
                _log.warning("another process is writing, says %s; waiting for it", self.path)
                told = True
            self.sleep(self.poll)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the acquired lease from running out, by a thread of its own, and give it back in the end."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.lifetime / 4):
                try:
                    self.renew()
                except OSError as error:
                    _log.warning("%s could not be renewed (%s); trying again", self.path, error)

        keeper = threading.Thread(target=renew, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            self.release()

    def renew(self) -> None:
        """Say that the holder is alive."""
        if self._holds():
            self._write()
        else:
            _log.warning("%s was taken by another process; both go on, and write the same files", self.path)

    def release(self) -> None:
        """Give the lease back."""
        if self._holds():
            self.filesystem.delete_file(self.path)

    def _holds(self) -> bool:
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
        except ValueError:  # being written, just now or when its writer died
            return {"holder": "", "renewed": info.mtime.timestamp() if info.mtime else 0.0}

    def _write(self) -> None:
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(json.dumps({"holder": self.holder, "renewed": self.now()}).encode())
