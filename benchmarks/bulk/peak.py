"""Classify a file of many rows in a process of its own, and print its peak memory and rows per second.

python -m benchmarks.bulk.peak MODEL ROWS FOLDER UNIT_ROWS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig

_GROUP_ROWS = 10_000
_WORDS = [
    "the",
    "film",
    "was",
    "a",
    "good",
    "and",
    "moving",
    "story",
    "but",
    "its",
    "end",
    "is",
    "too",
    "long",
    "for",
    "most",
    "people",
    "who",
    "see",
    "it",
]


def write_rows(file: Path, rows: int) -> None:
    """Write a Parquet file with texts of 1 to 40 words, row group by row group."""
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, _GROUP_ROWS):
            numbers = range(start, min(start + _GROUP_ROWS, rows))
            writer.write_table(pa.table({"id": numbers, "text": list(_texts(numbers))}, schema))


def _texts(numbers: range) -> Iterator[str]:
    for number in numbers:
        yield " ".join(_WORDS[(number + 7 * place) % len(_WORDS)] for place in range(1 + number * 37 % 40))


def peak_memory() -> float:
    """Return the largest resident size of this process in MiB. What getrusage returns includes that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def main(model: str, rows: int, folder: Path, unit_rows: int) -> None:
    """Print one line of JSON."""
    file = folder / f"{rows}.parquet"
    write_rows(file, rows)
    figures: dict[str, float] = {}
    config = BulkConfig(input=str(file), output=str(folder / str(rows)), model=model, unit_rows=unit_rows)
    report = classify_files(config, on_progress=lambda progress: figures.update(progress.metrics(1)))
    if report.totals.rows != rows:
        raise AssertionError(f"{report.totals.rows} rows were classified, not {rows}")
    found = {
        "rows": rows,
        "megabytes": round(peak_memory(), 1),
        "rows_per_second": round(figures["rows_per_second"], 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
