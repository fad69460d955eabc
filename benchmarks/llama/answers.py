"""Two questions, answered from the rows: where a shared pass beats leaving early, and what each part of it contributes."""

from __future__ import annotations

from typing import Any

from benchmarks.llama.tables import measured, percent
from revmux.methods import method_class

Row = dict[str, Any]
CONTROL = "skip-only"


def answer_words(rows: list[Row]) -> str:
    """Return both answers for every task of which enough has been measured."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = measured([row for row in rows if row["task"] == task])
        parts += [text for text in (_against_exits(task, own), _contributions(task, own)) if text]
    return "\n\n".join(parts or ["Not measured yet."]) + "\n"


def against_exits(rows: list[Row], figure: str) -> list[tuple[Row, Row]]:
    """Each shared pass, and the best early exit that costs at most as much; cheapest first.

    Args:
        rows: measured rows of one task. The skip-only control is an early exit too.
        figure: what the best exit has most of.
    """
    exits = [row for row in rows if method_class(row["method"]).exit_option is not None]
    found = []
    for row in sorted(rows, key=lambda row: row["cost_counted"]):
        rivals = [one for one in exits if one["cost_counted"] <= row["cost_counted"]]
        if method_class(row["method"]).multiplexes() and rivals:
            found.append((row, max(rivals, key=lambda one: one[figure])))
    return found


def contributions(rows: list[Row]) -> list[tuple[Row, Row, Row | None]]:
    """RevMUX with the recipe strong, its skip-only control, and RevMUX without the own-state correction if it has run."""
    controls = {row["prefill_layers"]: row for row in rows if row["method"] == CONTROL}
    without = {
        (row["num_inputs"], row["prefill_layers"]): row for row in rows if "without the own-state" in row["title"]
    }
    return [
        (row, controls[row["prefill_layers"]], without.get((row["num_inputs"], row["prefill_layers"])))
        for row in rows
        if row["method"] == "revmux"
        and row["recipe"] == "strong"
        and "without" not in row["title"]
        and row["prefill_layers"] in controls
    ]


def _against_exits(task: str, rows: list[Row]) -> str:
    parts = []
    for figure, name in (("accuracy_mean", "accuracy"), ("siso_agreement", "agreement with the teacher")):
        pairs = against_exits(rows, figure)
        if not pairs:
            return ""
        ahead = [row["cost_counted"] for row, rival in pairs if row[figure] > rival[figure]]
        where = f", at costs of {', '.join(f'{cost:.2f}' for cost in sorted(set(ahead)))}" if ahead else ""
        lines = [
            f"{task}, {name}: a shared pass is ahead of every measured early exit of at most its cost in {len(ahead)} of "
            f"{len(pairs)} cases{where}.",
            "",
            f"| shared pass | N | cost | {name} | best early exit of at most this cost | its cost | its {name} | gain, points |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['title']} | {row['num_inputs']} | {row['cost_counted']:.2f} | {percent(row[figure])} "
            f"| {rival['title']} | {rival['cost_counted']:.2f} | {percent(rival[figure])} | {_points(row, rival, figure)} |"
            for row, rival in pairs
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _contributions(task: str, rows: list[Row]) -> str:
    found = contributions(rows)
    if not found:
        return ""
    lines = [
        f"{task}: what each input's own prefilled state answers alone, and what the shared pass adds to it.",
        "",
        "| RevMUX | N | accuracy | own prefilled state alone (skip-only) | the shared pass adds, points "
        "| without the own-state correction | the correction adds, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, control, without in found:
        alone = ("–", "–") if without is None else (percent(without["accuracy_mean"]), _points(row, without))
        lines.append(
            f"| {row['title']} | {row['num_inputs']} | {percent(row['accuracy_mean'])} | {percent(control['accuracy_mean'])} "
            f"| {_points(row, control)} | {alone[0]} | {alone[1]} |"
        )
    return "\n".join(lines)


def _points(row: Row, other: Row, figure: str = "accuracy_mean") -> str:
    return f"{100 * (row[figure] - other[figure]):+.1f}"
