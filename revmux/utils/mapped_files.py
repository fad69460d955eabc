"""Release of the memory of memory-mapped files."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_madvise = getattr(ctypes.CDLL(None), "madvise", lambda *_: 0)


def release_pages(address: int, size: int) -> None:
    """Release the pages of a mapped file that this process has read. They stay in the kernel's page cache.

    Args:
        address: start of the map.
        size: its bytes.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is not None:  # without this advice, the system reclaims the pages on its own
        _madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def release_files(paths: Iterable[str]) -> None:
    """Release the pages of all maps of some files in this process. Does nothing where the system does not list maps."""
    wanted = set(paths)
    if not wanted or not _MAPS.is_file():
        return
    for line in _MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in wanted:
            start, _, end = fields[0].partition("-")
            release_pages(int(start, 16), int(end, 16) - int(start, 16))
