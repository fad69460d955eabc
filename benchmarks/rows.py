"""Rows of a benchmark: ratios measured in pairs within one run."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from revmux.utils.files import write_json


def ratio_row(name: str, ratios: Sequence[float], target: float | None = None) -> dict[str, Any]:
    """Return a row with the median, minimum and maximum over pairs.

    Args:
        name: the quotient, as text.
        ratios: one per pair.
        target: value that the median should reach, if any.
    """
    return {
        "name": name,
        "target": target,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": len(ratios),
    }


def unmeasured_row(name: str, why: str, target: float | None = None) -> dict[str, Any]:
    """Return a row without figures and the reason why it was not measured."""
    return {
        "name": name,
        "target": target,
        "ratio_median": None,
        "ratio_min": None,
        "ratio_max": None,
        "pairs": 0,
        "why": why,
    }


def verdict(row: dict[str, Any]) -> str:
    """Return whether a row's median reaches its target or, if ``bound`` is ``at most``, does not exceed it."""
    median, target = row["ratio_median"], row["target"]
    if median is None:
        return f"not measured: {row['why']}"
    if target is None:
        return "–"
    reached = median <= target if row.get("bound") == "at most" else median >= target
    return "met" if reached else "missed"


def digest(*settings: object) -> str:
    """Return 16 hexadecimal digits that change with any of the settings."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def kept_file(folder: Path, name: str, settings: object) -> Path:
    """Return the file in which :func:`kept_rows` keeps rows."""
    return folder / f"{name}-{digest(settings)}.json"


def kept_rows(folder: Path, name: str, settings: object, measure: Callable[[], Any]) -> Any:
    """Return measured rows, cached in a file per settings so that an interrupted benchmark resumes."""
    file = kept_file(folder, name, settings)
    if not file.is_file():
        started = time.perf_counter()
        write_json(file, measure())
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(file.read_text())
