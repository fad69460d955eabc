"""The output folder: parts, one record per finished unit, and the manifest of a finished job.

``part-NUMBER-HASH.parquet`` are the answers. Everything else is in the folder ``_revmux``, which readers of Parquet
folders skip: ``job.json`` (the settings), ``units/HASH.json`` (one per finished unit), ``time.json`` (the time of all workers),
and at the end ``manifest.json`` (all parts in the order of the input) and the summary. A part is complete once its
record exists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from revmux.bulk.units import Unit
from revmux.errors import UserError
from revmux.utils.place import Place

META = "_revmux"
JOB_NAME, MANIFEST_NAME, TIME_NAME = "job.json", "manifest.json", "time.json"
_READING_THREADS = 16


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit reports. It depends on the unit and the settings only, so it has no times.

    Attributes:
        part: file name of its answers.
        rows: number of rows.
        bytes: size of the file.
        sha256: hash of the file.
        errors: number of bad rows.
        truncated: number of truncated inputs.
        labels: number of rows by label.
        confidence: number of rows by confidence, in equal intervals of 0..1.
        answered_by: number of rows by stage, method and width, such as ``1 revmux N=2``; see :func:`describe_answer`.
        cost: counted cost of all answers; 1 is one input in the plain model. The audit is not included.
        audited: number of audited rows.
        agreed: number of audited rows with the plain model's label.
        sample: rows for the summary page: their hash, text, label, score and error.
        audit_cost: counted cost of the audit's passes through the plain model; 1 is one input.
    """

    part: str
    rows: int
    bytes: int
    sha256: str
    errors: int
    truncated: int
    labels: dict[str, int]
    confidence: list[int]
    answered_by: dict[str, int]
    cost: float
    audited: int
    agreed: int
    sample: list[dict[str, Any]]
    audit_cost: float = 0.0


class OutputError(UserError):
    """The output cannot be written, so no unit can finish."""


class OutputFolder:
    """Where the answers of a job are written.

    Args:
        location: a folder or URI.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.place = Place.open(location)
        self.meta = self.place.child(META)
        self.records = self.meta.child("units")

    @contextmanager
    def opened(self, settings: dict[str, Any]) -> Iterator[None]:
        """Hold the folder for one job. A new folder gets the settings, a used one must have the same.

        Args:
            settings: everything on which the answers depend, as plain data.

        Raises:
            UserError: another process writes there (on an object store, wait for it), or the folder has the answers of other settings.
        """
        for place in (self.place, self.meta, self.records):
            place.create()
        # A lease on an object store outlives its holder by two minutes; a continued job waits for that long.
        with self.meta.exclusive("lock", wait=not self.meta.local):
            settings = json.loads(json.dumps(settings))
            former = self._read(self.meta, JOB_NAME)
            if former is None:
                if self.place.files():
                    raise UserError(
                        f"output {self.location!r} contains other files, such as {self.place.files()[0]!r}; choose an "
                        "empty folder"
                    )
                self.meta.write(JOB_NAME, _json(settings))
            elif changed := list(differences(former, settings)):
                more = f", and {len(changed) - 1} more settings differ" if len(changed) > 1 else ""
                raise UserError(
                    f"output {self.location!r} was started with {changed[0]}{more}; choose another output, or the earlier settings"
                )
            yield

    def finished(self, units: Sequence[Unit], key: str) -> dict[int, UnitRecord]:
        """The records of the finished units, by the unit's number. A record without its part does not count."""
        present = set(self.records.files())
        sizes = self._part_sizes()
        wanted = [unit for unit in units if f"{unit_hash(unit, key)}.json" in present]
        with ThreadPoolExecutor(_READING_THREADS) as threads:
            found = threads.map(lambda unit: self._read(self.records, f"{unit_hash(unit, key)}.json"), wanted)
            records = {unit.number: UnitRecord(**content) for unit, content in zip(wanted, found) if content}
        return {number: one for number, one in records.items() if sizes.get(one.part) == one.bytes}

    def write_part(self, name: str, table: pa.Table) -> tuple[int, str]:
        """Write a part atomically; returns its size and hash.

        Raises:
            OutputError: it cannot be written.
        """
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        content = sink.getvalue()
        self._write(self.place, name, content)
        return content.size, hashlib.sha256(content).hexdigest()

    def write_record(self, unit: Unit, key: str, record: UnitRecord) -> None:
        """Record that a unit is finished."""
        self._write(self.records, f"{unit_hash(unit, key)}.json", _json(asdict(record)))

    def worker_seconds(self) -> float:
        """The time that the workers of all starts of this job have spent."""
        content = self._read(self.meta, TIME_NAME)
        return 0.0 if content is None else float(content["worker_seconds"])

    def write_worker_seconds(self, seconds: float) -> None:
        """Record the time that the workers of all starts of this job have spent."""
        self._write(self.meta, TIME_NAME, _json({"worker_seconds": seconds}))

    def write_manifest(self, units: Sequence[Unit], records: dict[int, UnitRecord], settings: dict[str, Any]) -> None:
        """Write the list of all parts, after which the output is complete.

        Raises:
            UserError: the parts do not have exactly the rows of the input.
        """
        parts = [
            {"name": record.part, "rows": record.rows, "bytes": record.bytes, "sha256": record.sha256}
            | {"file": unit.file, "first_row": unit.first_row}
            for unit in units
            for record in [records[unit.number]]
        ]
        rows, wanted = sum(record.rows for record in records.values()), sum(unit.rows for unit in units)
        if rows != wanted:
            raise UserError(
                f"the output has {rows:,} rows, but the input has {wanted:,}; remove the output and start again"
            )
        errors = sum(record.errors for record in records.values())
        self.place.sweep()  # readers of the folder would find the rows of a killed worker's unfinished file twice
        self.meta.write(MANIFEST_NAME, _json({"rows": rows, "errors": errors, "settings": settings, "parts": parts}))

    def remove_manifest(self) -> None:
        """Remove the manifest of a job that is no longer complete, because a part was lost."""
        if MANIFEST_NAME in self.meta.files():
            self.meta.remove_file(MANIFEST_NAME)

    def _part_sizes(self) -> dict[str, int]:
        from pyarrow.fs import FileSelector

        infos = self.place.filesystem.get_file_info(FileSelector(self.place.path))
        return {info.base_name: info.size for info in infos}

    @staticmethod
    def _write(place: Place, name: str, content: Any) -> None:
        try:
            place.write(name, content)
        except UserError as error:
            raise OutputError(str(error)) from None

    @staticmethod
    def _read(place: Place, name: str) -> Any:
        content = place.read(name)
        try:
            return None if content is None else json.loads(content.to_pybytes())
        except ValueError:
            raise UserError(f"{place.file(name)} is damaged; remove it and start again") from None


def unit_hash(unit: Unit, key: str) -> str:
    """The hash in the names of a unit's files: of the unit and of the job's settings."""
    return hashlib.sha256(f"{key} {unit!r}".encode()).hexdigest()[:16]


def part_name(unit: Unit, key: str) -> str:
    """The file name of a unit's answers. The order of the names is that of the input."""
    return f"part-{unit.number:06d}-{unit_hash(unit, key)}.parquet"


def settings_key(settings: dict[str, Any]) -> str:
    """A hash of all settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe_answer(stage: int, method: str, width: int) -> str:
    """The key of :attr:`UnitRecord.answered_by`; stage 0 is the plain model."""
    return f"{stage} {method} N={width}"


def differences(former: Any, given: Any, name: str = "") -> Iterator[str]:
    """Each setting that differs between nested mappings, as ``NAME FORMER, but this command has GIVEN``."""
    if isinstance(former, dict) and isinstance(given, dict):
        for key in dict.fromkeys([*former, *given]):
            yield from differences(former.get(key), given.get(key), f"{name}.{key}" if name else key)
    elif former != given:
        yield f"{name} {former!r:.80}, but this command has {given!r:.80}"


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
