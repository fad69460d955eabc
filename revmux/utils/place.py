"""A folder on the local disk or on a filesystem that pyarrow opens by URI, with atomic writes of files."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from revmux.errors import UserError
from revmux.utils.content_hash import Sink, file_digest
from revmux.utils.files import TEMPORARY, publish_file, remove_folder, write_durably
from revmux.utils.lease import LIFETIME
from revmux.utils.lock import exclusive
from revmux.utils.object_store import open_uri

BLOCK = 8 * 2**20
"""Bytes that are copied at a time, so that files of any size need little memory."""


class Place:
    """A folder on a filesystem.

    Args:
        filesystem: the filesystem.
        path: path of the folder.

    Attributes:
        local: whether files can be memory-mapped.
    """

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path.rstrip("/")
        self.local = isinstance(filesystem, LocalFileSystem)

    @classmethod
    def open(cls, root: str, filesystem: FileSystem | None = None) -> Place:
        """The folder at a path or URI, which need not exist.

        Args:
            root: a local path, or a URI such as ``s3://bucket/features``.
            filesystem: the filesystem of the path ``root``. By default, the local disk.

        Raises:
            UserError: see :func:`revmux.utils.object_store.open_uri`.
        """
        if filesystem is not None:
            return cls(filesystem, root)
        if "://" not in root:
            return cls(LocalFileSystem(), os.path.abspath(os.path.expanduser(root)))
        return cls(*open_uri(root))

    def child(self, name: str) -> Place:
        """A subfolder."""
        return Place(self.filesystem, f"{self.path}/{name}")

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        return f"{self.path}/{name}"

    def create(self) -> None:
        """Create the folder and its parents.

        Raises:
            UserError: the folder cannot be created.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path} ({error}); choose another folder") from None

    def files(self) -> list[str]:
        """Sorted names of the files in the folder."""
        return self._names(FileType.File)

    def files_below(self) -> list[str]:
        """Sorted names of the files in the folder and its subfolders, relative to the folder."""
        infos = self._infos(recursive=True)
        return sorted(info.path[len(self.path) + 1 :] for info in infos if info.type == FileType.File)

    def folders(self) -> list[str]:
        """Sorted names of the subfolders."""
        return self._names(FileType.Directory)

    def _names(self, kind: FileType) -> list[str]:
        return sorted(info.base_name for info in self._infos() if info.type == kind)

    def size_of(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        size: int | None = self.filesystem.get_file_info(self.file(name)).size
        return size

    def size(self) -> int:
        """Total size in bytes of all files in the folder and its subfolders."""
        return sum(info.size for info in self._infos(recursive=True) if info.type == FileType.File)

    def _infos(self, recursive: bool = False) -> list[FileInfo]:
        try:
            found: list[FileInfo] = self.filesystem.get_file_info(
                FileSelector(self.path, allow_not_found=True, recursive=recursive)
            )
        except FileNotFoundError:  # another process removed the folder while it was listed
            return []
        return found

    def free(self) -> int:
        """Free bytes on the local disk of the folder, which must exist."""
        return shutil.disk_usage(self.path).free

    def read(self, name: str) -> pa.Buffer | None:
        """A file's content, memory-mapped if local, otherwise read into memory. None if the file does not exist."""
        path = self.file(name)
        if self.filesystem.get_file_info(path).type != FileType.File:
            return None
        # A closed map keeps its pages for the buffers that refer to it, but needs no file descriptor.
        with pa.memory_map(path) if self.local else self.filesystem.open_input_file(path) as stream:
            return stream.read_buffer()

    def get(self, name: str) -> bytes:
        """A file's content.

        Raises:
            OSError: it does not exist or cannot be read.
        """
        with self.filesystem.open_input_file(self.file(name)) as stream:
            content: bytes = stream.read()
        return content

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write a file of any size in one piece.

        A local file is complete or does not exist. On another filesystem, a failure may leave a part of it there, so that
        something written later must show that it is complete.

        Raises:
            OSError: it cannot be written.
        """
        if self.local:
            write_durably(Path(self.file(name)), data)
            return
        with self.filesystem.open_output_stream(self.file(name)) as stream:
            stream.write(data)

    def digest(self, name: str) -> str | None:
        """Hash of a local file's bytes; None if it cannot be read. A process reads an unchanged file once."""
        return file_digest(self.file(name))

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file atomically: it is either complete and on disk, or does not exist under its name.

        Raises:
            UserError: see :meth:`writing`.
        """
        with self.writing(name, lambda _: name) as sink:
            sink.write(data)

    @contextmanager
    def writing(self, name: str, final: Callable[[str], str]) -> Iterator[Sink]:
        """Write a file atomically, piece by piece.

        Args:
            name: name of the file in messages.
            final: returns the name of the complete file for the hash of its content.

        Raises:
            UserError: the file cannot be written, for example because of missing space or permissions.
        """
        temporary = f"{name}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            if self.local:
                Path(self.path).mkdir(parents=True, exist_ok=True)
                with open(self.file(temporary), "wb") as file:
                    yield (sink := Sink(file))
                publish_file(Path(self.file(temporary)), Path(self.file(final(sink.digest()))))
            else:
                with self.filesystem.open_output_stream(self.file(temporary)) as stream:
                    yield (sink := Sink(stream))
                self._rename(self.file(temporary), self.file(final(sink.digest())))
        except OSError as error:
            raise UserError(
                f"cannot write {self.file(name)} ({error}); free some space there or choose another folder, "
                "then start again: complete files are kept"
            ) from None
        finally:
            with suppress(OSError):  # it exists only if the block did not end
                self.filesystem.delete_file(self.file(temporary))

    def copy(self, name: str, target: Place) -> None:
        """Copy a file to another folder atomically.

        Raises:
            UserError: the file is missing, or the copy cannot be written.
        """
        try:
            source = self.filesystem.open_input_stream(self.file(name))
        except FileNotFoundError:
            raise UserError(f"{self.file(name)} was removed while it was copied; start again") from None
        target.create()
        with source, target.writing(name, lambda _: name) as sink:
            while data := source.read(BLOCK):
                sink.write(data)

    def sweep(self) -> None:
        """Remove unfinished files of interrupted writers. The caller must hold the lock."""
        for name in self.files():
            if name.endswith(TEMPORARY):
                with suppress(FileNotFoundError):  # its writer has just finished
                    self.remove_file(name)

    def move(self, name: str, target: Place) -> None:
        """Move a file to the same name in another folder of the filesystem."""
        Place(self.filesystem, target.file(name).rpartition("/")[0]).create()
        self._rename(self.file(name), target.file(name))

    def _rename(self, source: str, target: str) -> None:
        try:
            self.filesystem.move(source, target)
        except NotImplementedError:  # an account of Azure without hierarchical namespaces
            self.filesystem.copy_file(source, target)
            self.filesystem.delete_file(source)

    def remove_file(self, name: str) -> None:
        """Remove a file in the folder."""
        self.filesystem.delete_file(self.file(name))

    def remove(self, name: str) -> None:
        """Remove a subfolder with its content."""
        self.filesystem.delete_dir(self.file(name))

    def remove_all(self) -> None:
        """Remove this folder with its content, if it exists. No error is raised if some of it cannot be removed."""
        if self.local:
            remove_folder(Path(self.path))
            return
        with suppress(OSError):
            self.filesystem.delete_dir(self.path)

    def exclusive(
        self, name: str, wait: bool = True, lifetime: float = LIFETIME
    ) -> AbstractContextManager[Callable[[], bool]]:
        """Hold a lock across processes, see :func:`revmux.utils.lock.exclusive`.

        Args:
            name: name of the lock file in this folder.
            wait: whether to wait if another process holds the lock.
            lifetime: seconds after which the lease of a process that was killed expires.
        """
        return exclusive(self.filesystem, self.file(name), wait, lifetime)
