"""The comparison that a person reads: a table in text, and accuracy against cost as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revmux.utils.extras import require
from revmux.utils.files import atomic_file

Row = Mapping[str, Any]
MARKERS = {"siso": "*", "exit-head": "s", "revmux": "o", "token-split": "^"}


def row_name(row: Row) -> str:
    """``revmux N=2 l=1``, ``exit-head layer 3``, ``siso``."""
    if row["method"] == "siso":
        return "SISO (the plain model)"
    if row["method"] == "exit-head":
        return f"exit head at layer {row['prefill_layers']}"
    return f"{row['method']} N={row['num_inputs']} l={row['prefill_layers']}"


def comparison_table(rows: Sequence[Row]) -> str:
    """A Markdown table, most expensive row first; what was not measured is a dash."""
    lines = [
        "| system | accuracy | agreement with SISO | cost, counted | throughput, measured | trained weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["cost_counted"]):
        spread = f" ± {row['accuracy_std']:.1%}" if row["accuracy_std"] else ""
        ratio = f"{row['throughput_ratio']:.2f}×" if row.get("throughput_ratio") else "–"
        lines.append(
            f"| {row_name(row)} | {row['accuracy_mean']:.1%}{spread} | {row['siso_agreement']:.1%} "
            f"| {row['cost_counted']:.2f} | {ratio} | {row['tunable_params']:,} |"
        )
    return "\n".join(lines)


def plot_front(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Accuracy against counted cost, one mark a row, with the spread over shuffles.

    Raises:
        UserError: matplotlib is not installed.
    """
    require("matplotlib", "report")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["method"], []).append(row)
    for method, members in families.items():
        members = sorted(members, key=lambda row: row["cost_counted"])
        axes.errorbar(
            [row["cost_counted"] for row in members],
            [100 * row["accuracy_mean"] for row in members],
            yerr=[100 * row["accuracy_std"] for row in members],
            marker=MARKERS.get(method, "D"),
            markersize=12 if method == "siso" else 8,
            linestyle="--" if len(members) > 1 else "",
            linewidth=1,
            capsize=3,
            label={"siso": "SISO (plain model)", "exit-head": "exit head"}.get(method, method),
        )
        for row in members:
            if method != "siso":
                text = f"layer {row['prefill_layers']}" if method == "exit-head" else f"N={row['num_inputs']}"
                place = (row["cost_counted"], 100 * row["accuracy_mean"])
                axes.annotate(text, place, textcoords="offset points", xytext=(7, 6), fontsize=9)
    siso = next((row for row in rows if row["method"] == "siso"), None)
    if siso is not None:
        axes.axhline(100 * siso["accuracy_mean"], linewidth=0.8, color="grey", linestyle=":")
    axes.set_xlabel("cost of an input, counted operations relative to SISO (left is cheaper)")
    axes.set_ylabel("accuracy on the test split, %")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    return path
