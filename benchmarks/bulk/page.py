"""The table of the section on bulk classification."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import verdict
from benchmarks.serving.page import figures_table


def bulk_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    settings, machine, data = meta["settings"], meta["machine"], meta["data"]
    targets = [verdict(row) for row in rows if row["target"] is not None and row["ratio_median"] is not None]
    sizes = "; ".join(
        f"{name}: {one['rows']:,} rows of {one['tokens']:g} tokens on average" for name, one in data.items()
    )
    how = (
        f"{targets.count('met')} of {len(targets)} targets met. {settings['pairs']} rounds, {settings['group_pairs']} for groups with {settings['group_scale']:g} times the rows, and {settings['large_pairs']} for the large file. {sizes}. {machine['cores']} cores, "
        f"{settings['threads']} threads per model; torch {meta['versions']['torch']}, ray {meta['versions']['ray']}, commit "
        f"`{(meta['commit'] or 'unknown')[:8]}`."
    )
    return {"bulk": f"{figures_table(rows)}\n\n{how}\n"}
