"""Plots of accuracy against cost with the front: a PNG, and an interactive HTML page that needs no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revmux.errors import UserError
from revmux.plan.front import LADDER, FrontRow, front
from revmux.utils.extras import require
from revmux.utils.files import atomic_file

MAX_LABELS = 10
"""About the most points of a front that are labelled in the picture."""
COST_LABEL = "cost of an input relative to SISO, {} (left is cheaper)"


def label_of(row: FrontRow) -> str:
    """The label of a point: ``N=2 l=3``, or ``layer 3`` for an exit head, later stages, and the share that falls back."""
    text = " → ".join([row.kind.point_name(row.num_inputs, row.prefill_layers), *row.later])
    return text if row.threshold is None else f"{text}, {row.fallback:.0%} fall back"


def marks_of(row: FrontRow) -> tuple[str, str]:
    """The markers of a row in matplotlib and in plotly."""
    return ("P", "cross") if row.group == LADDER else row.kind.marks


def legend_of(row: FrontRow) -> str:
    """The name of a row's group in a legend."""
    return LADDER if row.group == LADDER else row.kind.legend()


def plot_front_png(rows: Sequence[FrontRow], path: Path, title: str) -> Path:
    """Plot the rows as points and the front as a line; the file is written atomically.

    Raises:
        UserError: no rows, or matplotlib is not installed.
    """
    _check(rows)
    require("matplotlib", "report")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = front(rows)
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    axes.step(
        [row.cost for row in best],
        [100 * row.accuracy for row in best],
        where="post",
        color="grey",
        linewidth=1,
        label="front",
    )
    for group in sorted({row.group for row in rows}):
        members = [row for row in rows if row.group == group]
        axes.errorbar(
            [row.cost for row in members],
            [100 * row.accuracy for row in members],
            yerr=[100 * row.accuracy_std for row in members],
            fmt=marks_of(members[0])[0],
            markersize=7,
            capsize=3,
            alpha=0.8,
            label=legend_of(members[0]),
        )
    for row in best[:: max(1, len(best) // MAX_LABELS)]:
        point = (row.cost, 100 * row.accuracy)
        axes.annotate(label_of(row), point, textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set_xlabel(COST_LABEL.format(_kind(rows)))
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=11)
    axes.margins(0.09)  # room for the labels
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    return path


def plot_front_html(rows: Sequence[FrontRow], path: Path, title: str) -> Path:
    """Plot the same as one interactive page: it zooms, shows the settings of a point, and hides a method on a click.

    Raises:
        UserError: no rows, or plotly is not installed.
    """
    _check(rows)
    graphs = require("plotly.graph_objects", "report")
    best = front(rows)
    figure = graphs.Figure()
    figure.add_scatter(
        x=[row.cost for row in best],
        y=[100 * row.accuracy for row in best],
        mode="lines",
        line={"shape": "hv", "color": "grey"},
        name="front",
        hoverinfo="skip",
    )
    for group in sorted({row.group for row in rows}):
        members = [row for row in rows if row.group == group]
        figure.add_scatter(
            x=[row.cost for row in members],
            y=[100 * row.accuracy for row in members],
            mode="markers",
            marker={
                "symbol": marks_of(members[0])[1],
                "size": 11,
                "line": {"width": [2 if row in best else 0 for row in members], "color": "black"},
            },
            name=legend_of(members[0]),
            text=[_hover(row) for row in members],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(
        title=title,
        xaxis_title=COST_LABEL.format(_kind(rows)),
        yaxis_title="accuracy, %",
        template="plotly_white",
    )
    with atomic_file(path) as temporary:
        figure.write_html(temporary, include_plotlyjs=True, full_html=True)
    return path


def _hover(row: FrontRow) -> str:
    settings: dict[str, Any] = {
        "method": row.method,
        "N": row.num_inputs,
        "l": row.prefill_layers,
        "λ": "–" if math.isnan(row.infonce_weight) else f"{row.infonce_weight:g}",
        "accuracy": f"{row.accuracy:.2%}",
        "accuracy on the test split": "–" if math.isnan(row.test_accuracy) else f"{row.test_accuracy:.2%}",
        "points lost": f"{100 * (row.siso_accuracy - row.accuracy):.2f}",
        "cost counted": f"{row.cost_counted:.3f}",
        "throughput measured": "–" if row.throughput_ratio is None else f"{row.throughput_ratio:.2f}×",
    }
    if row.later:
        settings["later stages"] = ", ".join(row.later)
    if row.threshold is not None:
        settings |= {"threshold": f"{row.threshold:.3f}", "fall back": f"{row.fallback:.1%}"}
    return "<br>".join([f"<b>{row.name}</b>", *(f"{key}: {value}" for key, value in settings.items())])


def _kind(rows: Sequence[FrontRow]) -> str:
    measured = {row.throughput_ratio is not None for row in rows if not row.kind.is_plain}
    return {(True,): "measured", (False,): "counted", (): "counted"}.get(tuple(measured), "partly measured")


def _check(rows: Sequence[FrontRow]) -> None:
    if not rows:
        raise UserError("there is no row to plot (0 rows); a sweep has one once a trial has finished")
