"""How much of the memory-mapped shards a process keeps resident."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import pyarrow as pa

RESIDENT_BYTES = 8 * 2**20
"""About how much of one thing's shards stays resident in a process."""
READ_AHEAD = 64 * 2**10
"""What the kernel maps around the place that is read."""


class MappedPages:
    """Lets go of the pages of memory-mapped files after so many were read.

    What a process has read of a mapped file counts as its memory until the kernel wants it back, which would be the
    whole store after an epoch. Let go of, the pages stay in the kernel's cache, and reading them again costs little.

    Args:
        files: whole files as they were mapped.
    """

    def __init__(self, files: Sequence[pa.Buffer]) -> None:
        self.files = files
        self.touched = 0

    def touch(self, reads: int, size: int) -> None:
        """Count ``reads`` reads of ``size`` bytes together."""
        self.touched += size + reads * READ_AHEAD
        if self.touched > RESIDENT_BYTES:
            self.release()

    def release(self) -> None:
        """Let go of all pages now."""
        self.touched = 0
        for file in self.files:
            _let_go(file)


def _let_go(file: pa.Buffer) -> None:
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is not None:  # where the system knows no such advice, its own reclaim must do
        _madvise(ctypes.c_void_p(file.address), ctypes.c_size_t(file.size), advice)


_madvise = getattr(ctypes.CDLL(None), "madvise", lambda *_: 0)
