"""The hash of a file's content, computed while the file is written or read."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

import xxhash

SETTLED_NS = 10**9
"""Age from which a file's time of change tells whether it changes again; file systems store times with limited precision."""
_digests: dict[tuple[str, int, int, int], str] = {}


class Sink:
    """A file that is being written, with the hash of what was written so far.

    Args:
        stream: the file, opened for writing.

    Attributes:
        size: bytes written.
        closed: always False; whoever opened the file closes it.
    """

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash, self.size = stream, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data)
        self._stream.write(view)
        self._hash.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is complete."""

    def digest(self) -> str:
        """Hash of the bytes written so far, as :func:`file_digest` computes it."""
        return self._hash.hexdigest()


def file_digest(path: str) -> str | None:
    """Hash of a local file's bytes; None if it cannot be read. A process reads an unchanged file once."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            key = (path, status.st_ino, status.st_size, status.st_ctime_ns)
            if key in _digests:
                return _digests[key]
            found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except OSError:
        return None
    if time.time_ns() - status.st_ctime_ns > SETTLED_NS:
        _digests[key] = found
    return found
