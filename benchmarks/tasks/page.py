"""The tables of the sections on many tasks and on their replicas."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.rows import verdict


def tasks_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    settings, machine = meta["settings"], meta["machine"]
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
    return {"tasks": f"{_table(rows)}\n\n{how}\n"}


def routing_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the text for the mark of the choice of a task's replica."""
    meta, rows = result["meta"], result["rows"]
    settings, machine = meta["settings"], meta["machine"]
    legs = {"by_task": "each task on its replica", "fewest_requests": "on the replica with the fewest requests"}
    lines = [
        "| connections | requests | inputs per group | counted cost per input | requests per second | median seconds |",
        "|---|---|---|---|---|---|",
    ]
    by_load = {row["connections"]: row for row in rows}
    for connections, row in by_load.items():
        for leg, name in legs.items():
            found = row[leg]
            lines.append(
                f"| {connections} | {name} | {found['inputs_per_group']:.2f} | {found['cost_per_input']:.3f} | "
                f"{found['per_second']:.0f} | {found['p50_seconds']:.2f} |"
            )
    home = {leg: statistics.mean(row[leg]["home_share"] for row in by_load.values()) for leg in legs}
    how = (
        f"Cost is counted in inputs of the plain model. On average, {home['by_task']:.0%} of the requests for a task "
        f"went to the same replica, and {home['fewest_requests']:.0%} in the other legs. "
        f"{settings['tasks']} tasks on {settings['replicas']} replicas: {meta['backbone']['name']} with LoRA per task above layer "
        f"{settings['cut']}, and adapters of N = {', '.join(map(str, settings['widths']))}, all with random weights; "
        f"texts of {settings['tokens']} tokens. Medians of {settings['pairs']} legs of {settings['seconds']} s each. "
        f"{machine['cores']} cores, shared with wrk; ray {meta['versions']['ray']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    measured = "\n".join(lines)
    return {"routing": f"{_table(rows)}\n\n{measured}\n\n{how}\n"}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The ratios and their targets."""
    lines = ["| figure | target | median (min–max) | result |", "|---|---|---|---|"]
    for row in rows:
        sign = "≤" if row.get("bound") == "at most" else "≥"
        target = "–" if row["target"] is None else f"{sign} {row['target']:g}"
        found = f"{row['ratio_median']:.3g}"
        if row["pairs"] > 1:
            found += f" ({row['ratio_min']:.3g}–{row['ratio_max']:.3g})"
        lines.append(f"| {row['name']} | {target} | {found} | {verdict(row)} |")
    return "\n".join(lines)
