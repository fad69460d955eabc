"""A folder on a local disk or on any filesystem that pyarrow opens by URI: whole files, written all or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from revmux.errors import UserError
from revmux.features.lease import Lease

_log = logging.getLogger(__name__)
_TEMPORARY = ".tmp"
Stat = tuple[int, int | None]
"""Size in bytes and time of the last change in nanoseconds (None where a filesystem keeps none)."""


class Place:
    """A folder.

    Args:
        filesystem: where it is.
        path: its path there.

    Attributes:
        local: whether files can be memory-mapped.
    """

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path.rstrip("/")
        self.local = isinstance(filesystem, LocalFileSystem)

    @classmethod
    def open(cls, root: str, filesystem: FileSystem | None = None) -> Place:
        """The folder that a path or URI names; it need not exist yet.

        Args:
            root: a local path, or a URI such as ``s3://bucket/features``.
            filesystem: where ``root`` is a path, if not on the local disk.

        Raises:
            UserError: a URI that pyarrow cannot open.
        """
        if filesystem is not None:
            return cls(filesystem, root)
        if "://" not in root:
            return cls(LocalFileSystem(), os.path.abspath(os.path.expanduser(root)))
        try:
            return cls(*FileSystem.from_uri(root))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot open {root!r} ({reason}); name a folder, or a URI such as s3://, gs://, hdfs:// or file://"
            ) from None

    def child(self, name: str) -> Place:
        """A folder inside."""
        return Place(self.filesystem, f"{self.path}/{name}")

    def file(self, name: str) -> str:
        """The path of a file inside."""
        return f"{self.path}/{name}"

    def create(self) -> None:
        """Make the folder and its parents.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path} ({error}); choose another root for features") from None

    def stats(self, names: Sequence[str]) -> list[Stat | None]:
        """Size and time of change of files inside; None for those that are not there."""
        infos = self.filesystem.get_file_info([self.file(name) for name in names])
        return [(info.size, info.mtime_ns) if info.type == FileType.File else None for info in infos]

    def folders(self) -> list[str]:
        """Names of the folders inside, sorted."""
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == FileType.Directory)

    def size(self) -> int:
        """Bytes of all files inside, at any depth."""
        infos = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True, recursive=True))
        return sum(info.size for info in infos if info.type == FileType.File)

    def free(self) -> int | None:
        """Free bytes on the disk that holds this existing folder; None where that is unknown."""
        return shutil.disk_usage(self.path).free if self.local else None

    def read(self, name: str) -> pa.Buffer | None:
        """A file's bytes: memory-mapped where local, else read into memory; None if it is not there."""
        if self.stats([name]) == [None]:
            return None
        path = self.file(name)
        # A closed map keeps its pages for the buffers cut from it, without holding a file descriptor each.
        with pa.memory_map(path) if self.local else self.filesystem.open_input_file(path) as stream:
            return stream.read_buffer()

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a whole file: under its own name it is complete and on the disk, or not there."""
        temporary = self.file(f"{name}.{uuid.uuid4().hex}{_TEMPORARY}")
        if not self.local:
            with self.filesystem.open_output_stream(temporary) as stream:
                stream.write(data)
            self.filesystem.move(temporary, self.file(name))
            return
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.file(name))
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def sweep(self) -> None:
        """Remove what interrupted writers left unfinished; for the holder of the lock."""
        for info in self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True)):
            if info.type == FileType.File and info.base_name.endswith(_TEMPORARY):
                self.filesystem.delete_file(info.path)

    def remove(self, name: str) -> None:
        """Remove a folder inside with all that it holds."""
        self.filesystem.delete_dir(self.file(name))

    @contextmanager
    def exclusive(self, name: str, wait: bool = True) -> Iterator[Callable[[], None]]:
        """One holder at a time over all processes: a file lock where local, a lease file elsewhere.

        Args:
            name: of the lock, a file in this folder.
            wait: wait for another holder to finish.

        Yields:
            A function for the holder to call from time to time: it keeps a lease from running out.

        Raises:
            UserError: another holds it and ``wait`` is False.
        """
        busy = UserError(f"{self.file(name)}: another process is writing there; wait until it has finished")
        if not self.local:
            lease = Lease(self.filesystem, self.file(name))
            if not lease.acquire(wait):
                raise busy
            try:
                yield lease.renew
            finally:
                lease.release()
            return
        Path(self.path).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.file(name))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise busy from None
            _log.info("another process is writing %s; waiting for it", self.file(name))
            lock.acquire()
        try:
            yield lambda: None
        finally:
            lock.release()
