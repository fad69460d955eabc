"""Rows of a benchmark: ratios measured in pairs within one run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def ratio_row(name: str, ratios: Sequence[float], target: float | None = None) -> dict[str, Any]:
    """A row with the median and the ends of its pairs.

    Args:
        name: what is divided by what.
        ratios: one a pair.
        target: what the median is wanted to reach, if anything.
    """
    return {
        "name": name,
        "target": target,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": len(ratios),
    }
