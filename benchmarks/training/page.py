"""The table of the section on training: ratios against their targets."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import verdict

Row = dict[str, Any]


def training_words(result: Row) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta = result["meta"]
    lines = ["| ratio | backbone | N | target | median (min–max) | result |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        sign = "≤" if row.get("bound") == "at most" else "≥"
        target = "–" if row["target"] is None else f"{sign} {row['target']:g}"
        found = "–"
        if row["ratio_median"] is not None:
            found = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
        if "waiting_median" in row:
            found += f", {row['waiting_median']:.0%} of the time spent waiting"
        if "megabytes" in row:
            found += ", " + " against ".join(f"{size} MB" for size in reversed(row["megabytes"].values()))
        lines.append(
            f"| {row['name']} | {row.get('backbone', '–')} | {row.get('num_inputs', '–')} | {target} | {found} | {verdict(row)} |"
        )
    machine = meta["machine"]
    how = f"{machine['cores']} cores, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, torch {meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    return {"training": "\n".join(lines) + f"\n\n{how}\n"}
