"""Checkpoints: written whole or not at all, checked when they are read, the last ones kept and the best weights.

A checkpoint is a manifest, ``step-00000040.json``, which names its files with their sizes and sha256::

    step-00000040.pt   where training stands: weights, optimiser, schedule, place in the epoch
    best-00000003.pt   the weights of the best epoch, 3, shared by the checkpoints that name it

The manifest is written last, so a checkpoint without one was never finished and does not count.
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
    """What was saved.

    Attributes:
        step: optimiser steps done.
        state: as :meth:`revmux.training.trainer.Trainer.state_dict` gave it.
        best: the best weights so far, by name.
    """

    step: int
    state: dict[str, Any]
    best: dict[str, Tensor]


class _Damaged(Exception):
    """A checkpoint that is not as it was written; the message says how."""


class CheckpointFolder:
    """The checkpoints of one run. One process writes at a time: the one that :meth:`held` let in.

    Args:
        path: of the folder, made when the first checkpoint is saved; on a disk that every worker reaches.
        keep: checkpoints that are kept.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self.keep = keep
        self._known: dict[str, dict[str, Any]] = {}  # files that are there and sound, as manifests describe them

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the one process that reads and writes here, waiting for another to end.

        The workers of a driver that was killed may live on for a while, beside those of the next.

        Raises:
            UserError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.warning("another process still writes checkpoints to %s; waiting for it to end", self.path)
                lock.acquire()
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.path} ({error.strerror or error}); make room there, or name another "
                "storage folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def save(self, step: int, state: dict[str, Any], best: dict[str, Tensor], best_epoch: int) -> None:
        """Add a checkpoint and drop the oldest.

        Args:
            step: optimiser steps done.
            state: what :func:`torch.load` reads with ``weights_only``.
            best: the best weights so far; written only where ``best_epoch`` is new.
            best_epoch: which epoch they are of.

        Raises:
            UserError: the disk is full or refuses; the checkpoints before are untouched.
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
                self._drop_unnamed()
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.path} ({error.strerror or error}); {self._left()}"
            ) from error
        self._known = {best_name: files[best_name]}
        with suppress(OSError):  # what cannot be removed now is tried again with the next one
            self._drop_old(step)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is as it was written; None where none was ever finished.

        Raises:
            UserError: there are checkpoints and all are damaged.
        """
        damages = []
        for step in self._steps():
            try:
                return self._read(step)
            except _Damaged as damage:
                damages.append(f"step {step}: {damage}")
                _log.warning("the checkpoint of step %d in %s is damaged (%s): left out", step, self.path, damage)
        if damages:
            raise UserError(
                f"every checkpoint in {self.path} is damaged ({'; '.join(damages)}); remove that folder to train anew"
            )
        return None

    def load_step(self, step: int) -> Checkpoint:
        """The checkpoint that another worker chose.

        Raises:
            UserError: it is not here, or not as it was written.
        """
        try:
            return self._read(step)
        except _Damaged as damage:
            raise UserError(
                f"this worker cannot read the checkpoint of step {step} in {self.path} that the first one read ({damage}); "
                "name a storage folder on a disk that every worker reaches"
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
        for name, described in files.items():
            try:
                content = (self.path / name).read_bytes()
            except OSError as error:
                raise _Damaged(f"{name}: {error.strerror}") from None
            if file_digest(content) != described:
                raise _Damaged(f"{name} has {len(content)} bytes and another checksum than its manifest says")
            try:
                value = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError, EOFError):
                raise _Damaged(f"{name} holds more than weights and numbers") from None
            values[name.partition("-")[0]] = value
            if name.startswith("best-"):
                self._known = {name: described}
        return Checkpoint(step, values["step"], values["best"])

    def _files(self, step: int) -> dict[str, dict[str, Any]]:
        """A manifest's files, state first."""
        try:
            manifest = json.loads(self._manifest(step).read_bytes())
            files = dict(sorted(manifest["files"].items(), reverse=True))
            if [name.partition("-")[0] for name in files] != ["step", "best"]:
                raise ValueError(f"names {', '.join(files) or 'no files'}")
        except OSError as error:
            raise _Damaged(f"its manifest: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _Damaged("its manifest is not whole") from None
        if manifest.get("format") != FORMAT:
            raise _Damaged(f"its format is {manifest.get('format')}, this version reads {FORMAT}")
        return files

    def _drop_old(self, step: int) -> None:
        """Keep the newest whole ones up to ``step``; later ones are damaged, or of a run that has gone back."""
        kept = [old for old in self._steps() if old <= step and self._is_whole(old)][: self.keep]
        for old in self._steps():
            if old > step or old < min(kept, default=step):
                self._manifest(old).unlink(missing_ok=True)
        self._drop_unnamed()

    def _is_whole(self, step: int) -> bool:
        """Whether a checkpoint's files are there in full; their checksums are compared when it is read."""
        try:
            return all(self._has(name, described) for name, described in self._files(step).items())
        except _Damaged:
            return False

    def _has(self, name: str, described: dict[str, Any]) -> bool:
        try:
            return (self.path / name).stat().st_size == int(described["bytes"])
        except OSError:
            return False

    def _drop_unnamed(self) -> None:
        """Remove files that no manifest names, those of a write that was cut off too."""
        named: set[str] = set()
        for step in self._steps():
            try:
                named |= self._files(step).keys()
            except _Damaged:
                named |= {path.name for path in self._data_files()}  # it may name any of them
        for path in self._data_files():
            if path.name not in named:
                path.unlink(missing_ok=True)

    def _data_files(self) -> Iterator[Path]:
        for pattern in ("step-*.pt", "best-*.pt", ".step-*", ".best-*"):
            yield from self.path.glob(pattern)

    def _left(self) -> str:
        steps = self._steps()
        where = "make room there, or name another storage folder"
        return f"{where}; the same command then goes on from step {steps[0]}" if steps else where


def file_digest(content: bytes | memoryview) -> dict[str, Any]:
    """Size and sha256 of a file's content, as a manifest has them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
