"""The tables of every system and of the ladders on the pretrained LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PUBLISHED = Path(__file__).resolve().parent.parent / "published.json"
PUBLISHED_BACKBONE = "llama-3-8b"


def measured(rows: list[Row]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if row["accuracy_mean"] is not None]


def percent(value: float | None) -> str:
    """A share as a percentage without its sign, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def system_words(rows: list[Row], data: Row) -> str:
    """Return a table per task, dearest system first, beside the published accuracy; and how it was measured."""
    published = json.loads(PUBLISHED.read_text())
    parts = [_table(task, [row for row in rows if row["task"] == task], published) for task in _tasks(rows)]
    sizes = ", ".join(
        f"{name} {size['labelled']:,} / {size['train']:,} / {size['choosing']:,} / {size['test']:,}"
        for name, size in data.items()
    )
    how = "Accuracy is measured on the dev split in random groups; agreement is that with the teacher's answers."
    if sizes:
        how = f"Labelled / unlabelled / choosing / dev inputs: {sizes}. {how}"
    return "\n\n".join([*parts, how])


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _table(task: str, rows: list[Row], published: Row) -> str:
    done = sorted(measured(rows), key=lambda row: -row["cost_counted"])
    missing = len(rows) - len(done)
    title = f"**{task}**" + (f" ({missing} of {len(rows)} systems have not run yet)" if missing else "")
    if not done:
        return title
    lines = [
        "| system | N | cost, counted | throughput, measured | accuracy | grouped as served | agreement with the teacher "
        "| seeds | published, LLaMA3-8B |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in done:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        throughput = "–" if row["throughput_ratio"] is None else f"{row['throughput_ratio']:.2f}×"
        lines.append(
            f"| {row['title']} | {row['num_inputs']} | {row['cost_counted']:.2f} | {throughput} "
            f"| {percent(row['accuracy_mean'])}{spread} | {percent(row.get('accuracy_served'))} "
            f"| {percent(row['siso_agreement'])} | {row['seeds']} "
            f"| {_published(task, row, published)} |"
        )
    return f"{title}\n\n" + "\n".join(lines)


def _published(task: str, row: Row, published: Row) -> str:
    """The paper's accuracy of the same system with its cut at half of the layers; its average where it has no more."""
    column = published["tasks"].index(task)
    for there in published["rows"]:
        name = row["title"].partition(" l=15")[0]
        same = (there["backbone"], there["title"], there["num_inputs"]) == (
            PUBLISHED_BACKBONE,
            name,
            row["num_inputs"],
        )
        if same and name != row["title"]:
            value = there["accuracy"][column]
            return f"{there['accuracy'][-1]:.2f} (average)" if value is None else f"{value:.2f}"
    return "–"


def ladder_words(rows: list[Row]) -> str:
    """Return the ladders that were measured, and how many were not."""
    done = measured(rows)
    if not done:
        return "Not measured yet.\n"
    lines = [
        "| task | cost allowed | systems | stages | falls back | cost, counted | throughput | accuracy | agreement |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['task']} | {row['most_cost']:g} | {row['systems']} | {_stages(row)} | {row['fallback']:.0%} "
        f"| {row['cost_counted']:.2f} | {row['throughput_ratio']:.2f}× | {percent(row['accuracy_mean'])} "
        f"| {percent(row['siso_agreement'])} |"
        for row in done
    ]
    return "\n".join(lines) + "\n"


def _stages(row: Row) -> str:
    names = []
    for stage in row["stages"]:
        layer = stage["options"].get("layer")
        place = f"layer {layer}" if layer is not None else f"N={stage['num_inputs']} l={stage['prefill_layers']}"
        names.append(f"{stage['method'].replace('exit-head', 'exit head')}, {place}")
    return " → ".join([*names, *(["plain model"] if row["stages"][-1]["threshold"] else [])])
