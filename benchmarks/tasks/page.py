"""The table of the section on many tasks."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import verdict


def tasks_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    settings, machine = meta["settings"], meta["machine"]
    lines = ["| figure | target | median (min–max) | result |", "|---|---|---|---|"]
    for row in rows:
        sign = "≤" if row.get("bound") == "at most" else "≥"
        target = "–" if row["target"] is None else f"{sign} {row['target']:g}"
        found = f"{row['ratio_median']:.3g}"
        if row["pairs"] > 1:
            found += f" ({row['ratio_min']:.3g}–{row['ratio_max']:.3g})"
        lines.append(f"| {row['name']} | {target} | {found} | {verdict(row)} |")
    with_targets = [verdict(row) for row in rows if row["target"] is not None]
    memory = next(row for row in rows if "file_bytes" in row)
    how = (
        f"{with_targets.count('met')} of {len(with_targets)} targets met. {settings['tasks']:,} random adapters on "
        f"{meta['backbone']['name']}: LoRA of rank {settings['rank']} in all linear maps above layer {settings['frozen_layers']}, and a "
        f"head; {memory['file_bytes'] / 1e6:.2f} MB of files and {memory['bytes'] / 1e6:.2f} MB of memory each. Texts of "
        f"{settings['tokens']} tokens, {settings['clients']} clients unless stated, {settings['rounds']} rounds. The clients run in the "
        f"process of the replica, without HTTP. {machine['cores']} cores, {settings['threads']} threads; torch "
        f"{meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    table = "\n".join(lines)
    return {"tasks": f"{table}\n\n{how}\n"}
