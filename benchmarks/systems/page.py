"""The tables of docs/systems.md: our rows beside the paper's, then every backbone family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from revmux.methods import method_class

Row = dict[str, Any]
PUBLISHED = Path(__file__).resolve().parent.parent / "published.json"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _find(rows: list[Row], **wanted: object) -> Row | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def task_table(rows: list[Row], published: list[Row]) -> str:
    """Return a table of every system at every N: accuracy here, and points lost against SISO here and in the paper."""
    trained = [row for row in rows if row["accuracy_mean"] is not None]
    siso = next(row["accuracy_mean"] for row in trained if method_class(row["method"]).is_plain)
    base = next(row["accuracy"][-1] for row in published if row["title"] == "SISO")
    lines = [
        "| system | N | l | trained weights | cost, counted | throughput | accuracy here | points lost here | published average (BERT-base, GLUE) | points lost there |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in trained:
        there = _find(published, backbone="bert-base", title=row["title"], num_inputs=row["num_inputs"])
        average = there["accuracy"][-1] if there else None
        spread = f" ± {100 * row['accuracy_std']:.1f}" if row["seeds"] > 1 else ""
        lines.append(
            f"| {row['title']} | {row['num_inputs']} | {row['prefill_layers']} | {row['tunable_params']:,} "
            f"| {row['cost_counted']:.2f} | {_number(row.get('throughput_ratio'), '.2f')}× "
            f"| {100 * row['accuracy_mean']:.1f}{spread} | {100 * (siso - row['accuracy_mean']):.1f} "
            f"| {_number(average, '.2f')} | {_number(None if average is None else base - average, '.2f')} |"
        )
    return "\n".join(lines)


def shape_table(rows: list[Row], published: list[Row]) -> str:
    """Return a table of the paper's backbones at N = 2: trained weights and counted cost of each system."""
    lines = [
        "| backbone | system | N | l | trained weights | cost, counted | published average |",
        "|---|---|---|---|---|---|---|",
    ]
    shapes = [row for row in rows if row.get("why", "").startswith("counted")]
    for row in shapes:
        there = _find(published, backbone=row["backbone"], title=row["title"], num_inputs=row["num_inputs"])
        if row["num_inputs"] > 2 and there is None:
            continue
        lines.append(
            f"| {row['backbone']} | {row['title']} | {row['num_inputs']} | {row['prefill_layers']} "
            f"| {row['tunable_params']:,} | {row['cost_counted']:.3f} "
            f"| {_number(there['accuracy'][-1] if there else None, '.2f')} |"
        )
    return "\n".join(lines)


def family_table(rows: list[Row]) -> str:
    """Return a table of measured throughput against SISO: one row per family and system, one column per N."""
    measured = [row for row in rows if row.get("why", "").startswith("random")]
    widths = sorted({row["num_inputs"] for row in measured if row["num_inputs"] > 1})
    lines = [
        f"| family | system | {' | '.join(f'N = {n}' for n in widths)} |",
        f"|---|---|{'---|' * len(widths)}",
    ]
    keys = dict.fromkeys((row["family"], row["title"]) for row in measured if row["num_inputs"] > 1)
    for family, title in keys:
        cells = []
        for width in widths:
            row = _find(measured, family=family, title=title, num_inputs=width)
            cells.append("–" if row is None else f"{row['throughput_ratio']:.2f}× ({1 / row['cost_counted']:.2f})")
        lines.append(f"| {family} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def systems_words(result: Row) -> dict[str, str]:
    """Return the text for each mark of the page."""
    meta, rows = result["meta"], result["rows"]
    published = json.loads(PUBLISHED.read_text())["rows"]
    budget, data, machine = meta["budget"], meta["data"], meta["machine"]
    seeds = max(row.get("seeds", 0) for row in rows)
    how = (
        f"{data['train']} training and {data['test']} test sentences; {budget['epochs']} epochs "
        f"({budget['tuned_epochs']} where the backbone is tuned, {budget['exit_head_epochs']} for exit heads), batches of "
        f"{budget['batch_size']}, {seeds} seeds × {budget['shuffles']} shuffles (± is the spread over the seeds of the adapters; there is one task model). "
        f"{machine['cores']} cores, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, torch {meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    return {
        "systems-task": f"{task_table(rows, published)}\n\n{how}\n",
        "systems-shapes": f"{shape_table(rows, published)}\n",
        "systems-families": f"{family_table(rows)}\n",
    }
