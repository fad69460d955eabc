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
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revmux.errors import UserError
from revmux.utils.lease import RUN_LIFETIME
from revmux.utils.place import Place
from revmux.utils.redact import error_line, without_passwords

_log = logging.getLogger(__name__)
FORMAT = 1
_MANIFEST = re.compile(r"step-(\d{8})\.json")


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
        location: the folder or URI, created when the first checkpoint is saved, which every worker can read.
        keep: number of checkpoints to keep.

    Raises:
        UserError: the URI cannot be opened.
    """

    def __init__(self, location: str | Path, keep: int = 2) -> None:
        self.place = Place.open(str(location))
        self.name = without_passwords(str(location))
        self.keep = keep
        self._still_locked: Callable[[], bool] = lambda: True
        self._known: dict[str, dict[str, Any]] = {}  # valid files and their manifest entries

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock while checkpoints are read and written; wait if another process holds it.

        The workers of a killed driver can keep running for a while after the next driver has started its own. On an object
        store, the lock is a lease that the holder renews.

        Raises:
            UserError: the folder cannot be created or written.
        """
        with ExitStack() as stack:
            try:
                self.place.filesystem.create_dir(self.place.path, recursive=True)
                self._still_locked = stack.enter_context(self.place.exclusive(".lock", lifetime=RUN_LIFETIME))
            except OSError as error:
                raise UserError(
                    f"cannot write checkpoints to {self.name} ({error_line(error)}); free some space there, or choose another storage"
                ) from error
            yield

    def save(self, step: int, state: dict[str, Any], best: dict[str, Tensor], best_epoch: int) -> None:
        """Add a checkpoint and delete the oldest.

        Args:
            step: number of optimizer steps completed.
            state: anything that :func:`torch.load` can read with ``weights_only``.
            best: the best weights so far; written only if ``best_epoch`` is new.
            best_epoch: the epoch that ``best`` is from.

        Raises:
            UserError: the disk is full or a write fails; earlier checkpoints are untouched. Or another process has acquired
                the folder's lease, because this one was suspended or cut off.
        """
        state_name, best_name = f"step-{step:08d}.pt", f"best-{best_epoch:08d}.pt"
        try:
            if not self._still_locked():
                raise UserError(
                    f"another process continues this run and writes its checkpoints to {self.name}; this process lost its "
                    "lease, because it could not renew it in time"
                )
            files = {state_name: self._write(state_name, state)}
            known = self._known.get(best_name)
            if known is None or not self._has(best_name, known):
                known = self._write(best_name, best)
            files[best_name] = known
            manifest = {"format": FORMAT, "step": step, "files": files}
            self.place.put(_manifest(step), (json.dumps(manifest, indent=2) + "\n").encode())
        except OSError as error:
            with suppress(OSError):
                self._delete_unlisted()
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.name} ({error_line(error)}); {self._remedy()}"
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
                _log.warning("skipped the checkpoint of step %d in %s: it is damaged (%s)", step, self.name, damage)
        if damages:
            raise UserError(
                f"every checkpoint in {self.name} is damaged ({'; '.join(damages)}); delete that folder to restart training"
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
                f"this worker cannot read the checkpoint of step {step} in {self.name} that rank 0 has read ({damage}); "
                "choose a storage that every worker can read"
            ) from None

    def remove(self) -> None:
        """Remove the folder. If this is interrupted, what is left has no checkpoint, not a damaged one."""
        if not self.place.local:
            with suppress(OSError):
                for step in self._steps():
                    self._remove(_manifest(step))
        self.place.remove_all()

    def _steps(self) -> list[int]:
        found = [_MANIFEST.fullmatch(name) for name in self.place.files()]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _write(self, name: str, value: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = buffer.getbuffer()
        self.place.put(name, content)
        return file_digest(content)

    def _read(self, step: int) -> Checkpoint:
        files = self._files(step)
        values = {}
        for name, entry in files.items():
            try:
                content = self._get(name)
            except FileNotFoundError:
                raise _Damaged(f"{name} is missing") from None
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

    def _get(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: it is missing.
            _Damaged: the disk cannot read it.
            UserError: an object store cannot be reached, which does not damage a file.
        """
        try:
            return self.place.get(name)
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.place.local:
                raise _Damaged(f"{name}: {error_line(error)}") from None
            raise UserError(
                f"cannot read the checkpoints in {self.name} ({error_line(error)}); run the same command again when it can "
                "be read"
            ) from error

    def _files(self, step: int) -> dict[str, dict[str, Any]]:
        """The files that a manifest lists, the state first."""
        try:
            manifest = json.loads(self._get(_manifest(step)))
            files = dict(sorted(manifest["files"].items(), reverse=True))
            if [name.partition("-")[0] for name in files] != ["step", "best"]:
                raise ValueError(f"lists {', '.join(files) or 'no files'}")
        except FileNotFoundError:
            raise _Damaged("its manifest is missing") from None
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
                self._remove(_manifest(old))
        self._delete_unlisted()

    def _is_complete(self, step: int) -> bool:
        """Whether all files of a checkpoint exist with their full size; checksums are compared on reading."""
        try:
            return all(self._has(name, entry) for name, entry in self._files(step).items())
        except _Damaged:
            return False

    def _has(self, name: str, entry: dict[str, Any]) -> bool:
        return self.place.size_of(name) == int(entry["bytes"])

    def _delete_unlisted(self) -> None:
        """Delete files that no manifest lists, including those of an interrupted write."""
        listed: set[str] = set()
        for step in self._steps():
            try:
                listed |= self._files(step).keys()
            except _Damaged:
                listed |= set(self._data_files())  # it may list any of them
        for name in self._data_files():
            if name not in listed:
                self._remove(name)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.place.remove_file(name)

    def _data_files(self) -> list[str]:
        known = ("step-", "best-", ".step-", ".best-")
        return [name for name in self.place.files() if name.startswith(known) and not _MANIFEST.fullmatch(name)]

    def _remedy(self) -> str:
        steps = []
        with suppress(OSError):
            steps = self._steps()
        remedy = "free some space there, or choose another storage"
        return f"{remedy}; the same command then resumes from step {steps[0]}" if steps else remedy


def _manifest(step: int) -> str:
    return f"step-{step:08d}.json"


def file_digest(content: bytes | memoryview) -> dict[str, Any]:
    """The manifest entry of a file: the size and sha256 of its content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
