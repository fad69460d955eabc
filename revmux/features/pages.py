"""Limit on the resident memory of memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from revmux.utils.mapped_files import release_pages

RESIDENT_BYTES = 8 * 2**20
"""Approximate number of bytes of one shard set that stay resident in a process."""
READ_AHEAD = 512 * 2**10
"""Bytes that the kernel maps around each read. It maps whole folios, which it makes larger for large files."""


class MappedPages:
    """Releases the pages of memory-mapped files once a certain number of bytes was read.

    The pages that a process has read count as its memory until the kernel reclaims them. After an epoch, that would be
    the whole store. Released pages stay in the kernel's page cache, so reading them again is cheap.

    Args:
        files: the mapped files, complete.
    """

    def __init__(self, files: Iterable[pa.Buffer] = ()) -> None:
        self.files = list(files)
        self.touched = 0

    def add(self, file: pa.Buffer) -> None:
        """Add a mapped file."""
        self.files.append(file)

    def touch(self, reads: int, size: int) -> None:
        """Count ``reads`` reads with a total of ``size`` bytes."""
        self.touched += size + reads * READ_AHEAD
        if self.touched > RESIDENT_BYTES:
            self.release()

    def release(self) -> None:
        """Release all pages."""
        self.touched = 0
        for file in self.files:
            release_pages(file.address, file.size)
