"""Training checkpoints: written atomically and verified when they are read.

The folder keeps the latest checkpoints and the weights of the best epoch. A checkpoint is a manifest,
``step-00000040.json``, which lists its files with their sizes and sha256::

    step-00000040.pt   the training state: weights, optimizer, schedule, position in the epoch
    best-00000003.pt   the weights of the best epoch, here epoch 3, shared by the checkpoints that list it

The manifest is written last, so a checkpoint without a manifest is incomplete and is ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from revmux.errors import UserError
from revmux.utils.files import write_durably, write_json

_log = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        step: number of optimizer steps completed.
        state: as returned by :meth:`revmux.training.trainer.Trainer.state_dict`.
        best: the best weights so far, by name.
    """

    step: int
    state: dict[str, Any]
    best: dict[str, Tensor]


class _Damaged(Exception):
    """A checkpoint is missing or differs from what was written; the message says how."""


class CheckpointFolder:
    """The checkpoints of one run. One process writes at a time: the one that holds the lock, see :meth:`locked`.

    Args:
        path: the folder, created when the first checkpoint is saved, on a disk that every worker can read.
        keep: number of checkpoints to keep.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self.keep = keep
        self._known: dict[str, dict[str, Any]] = {}  # valid files and their manifest entries

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock while checkpoints are read and written; wait if another process holds it.

        The workers of a killed driver can keep running for a while after the next driver has started its own.

        Raises:
            UserError: the folder cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.warning("another process is still writing checkpoints to %s; waiting for it to end", self.path)
                lock.acquire()
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.path} ({error.strerror or error}); make room there, or choose "
                "another storage folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def save(self, step: int, state: dict[str, Any], best: dict[str, Tensor], best_epoch: int) -> None:
        """Add a checkpoint and delete the oldest.

        Args:
            step: number of optimizer steps completed.
            state: anything that :func:`torch.load` can read with ``weights_only``.
            best: the best weights so far; written only if ``best_epoch`` is new.
            best_epoch: the epoch that ``best`` is from.

        Raises:
            UserError: the disk is full or a write fails; earlier checkpoints are untouched.
        """
        state_name, best_name = f"step-{step:08d}.pt", f"best-{best_epoch:08d}.pt"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            files = {state_name: self._write(state_name, state)}
            known = self._known.get(best_name)
            if known is None or not self._has(best_name, known):
                known = self._write(best_name, best)
            files[best_name] = known
            manifest = {"format": FORMAT, "step": step, "files": files}
            write_json(self._manifest(step), manifest)
        except OSError as error:
            with suppress(OSError):
                self._delete_unlisted()
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.path} ({error.strerror or error}); {self._remedy()}"
            ) from error
        self._known = {best_name: files[best_name]}
        with suppress(OSError):  # files that cannot be deleted now are tried again after the next checkpoint
            self._delete_old(step)

    def load(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None if no checkpoint was ever completed.

        Raises:
            UserError: there are checkpoints and all are damaged.
        """
        damages = []
        for step in self._steps():
            try:
                return self._read(step)
            except _Damaged as damage:
                damages.append(f"step {step}: {damage}")
                _log.warning("skipped the checkpoint of step %d in %s: it is damaged (%s)", step, self.path, damage)
        if damages:
            raise UserError(
                f"every checkpoint in {self.path} is damaged ({'; '.join(damages)}); delete that folder to restart training"
            )
        return None

    def load_step(self, step: int) -> Checkpoint:
        """The checkpoint of a step that another worker has chosen.

        Raises:
            UserError: it is missing or damaged here.
        """
        try:
            return self._read(step)
        except _Damaged as damage:
            raise UserError(
                f"this worker cannot read the checkpoint of step {step} in {self.path} that rank 0 has read ({damage}); "
                "choose a storage folder on a disk that every worker can read"
            ) from None

    def _steps(self) -> list[int]:
        return sorted(
            (int(path.stem.partition("-")[2]) for path in self.path.glob(f"step-{'[0-9]' * 8}.json")), reverse=True
        )

    def _manifest(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.json"

    def _write(self, name: str, value: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = buffer.getbuffer()
        write_durably(self.path / name, content)
        return file_digest(content)

    def _read(self, step: int) -> Checkpoint:
        files = self._files(step)
        values = {}
        for name, entry in files.items():
            try:
                content = (self.path / name).read_bytes()
            except OSError as error:
                raise _Damaged(f"{name}: {error.strerror}") from None
            if file_digest(content) != entry:
                raise _Damaged(f"{name} has {len(content)} bytes and does not match the checksum in its manifest")
            try:
                value = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError, EOFError):
                raise _Damaged(f"{name} contains objects other than weights and plain values") from None
            values[name.partition("-")[0]] = value
            if name.startswith("best-"):
                self._known = {name: entry}
        return Checkpoint(step, values["step"], values["best"])

    def _files(self, step: int) -> dict[str, dict[str, Any]]:
        """The files that a manifest lists, the state first."""
        try:
            manifest = json.loads(self._manifest(step).read_bytes())
            files = dict(sorted(manifest["files"].items(), reverse=True))
            if [name.partition("-")[0] for name in files] != ["step", "best"]:
                raise ValueError(f"lists {', '.join(files) or 'no files'}")
        except OSError as error:
            raise _Damaged(f"its manifest: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _Damaged("its manifest is incomplete") from None
        if manifest.get("format") != FORMAT:
            raise _Damaged(f"its format is {manifest.get('format')}, but this version reads format {FORMAT}")
        return files

    def _delete_old(self, step: int) -> None:
        """Keep the newest complete checkpoints up to ``step``.

        Later ones are damaged, or the run has resumed from an earlier step.
        """
        kept = [old for old in self._steps() if old <= step and self._is_complete(old)][: self.keep]
        for old in self._steps():
            if old > step or old < min(kept, default=step):
                self._manifest(old).unlink(missing_ok=True)
        self._delete_unlisted()

    def _is_complete(self, step: int) -> bool:
        """Whether all files of a checkpoint exist with their full size; checksums are compared on reading."""
        try:
            return all(self._has(name, entry) for name, entry in self._files(step).items())
        except _Damaged:
            return False

    def _has(self, name: str, entry: dict[str, Any]) -> bool:
        try:
            return (self.path / name).stat().st_size == int(entry["bytes"])
        except OSError:
            return False

    def _delete_unlisted(self) -> None:
        """Delete files that no manifest lists, including those of an interrupted write."""
        listed: set[str] = set()
        for step in self._steps():
            try:
                listed |= self._files(step).keys()
            except _Damaged:
                listed |= {path.name for path in self._data_files()}  # it may list any of them
        for path in self._data_files():
            if path.name not in listed:
                path.unlink(missing_ok=True)

    def _data_files(self) -> Iterator[Path]:
        for pattern in ("step-*.pt", "best-*.pt", ".step-*", ".best-*"):
            yield from self.path.glob(pattern)

    def _remedy(self) -> str:
        steps = self._steps()
        remedy = "make room there, or choose another storage folder"
        return f"{remedy}; the same command then resumes from step {steps[0]}" if steps else remedy


def file_digest(content: bytes | memoryview) -> dict[str, Any]:
    """The manifest entry of a file: the size and sha256 of its content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
