"""The comparison of systems as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from revmux.methods import method_class
from revmux.plan.front import FrontRow

Row = Mapping[str, Any]


def row_name(row: Row) -> str:
    """The name of a row's system: ``revmux N=2 l=1``, ``exit head at layer 3`` or ``SISO (the plain model)``."""
    return method_class(row["method"]).system_name(row["num_inputs"], row["prefill_layers"])


def front_row(row: Row) -> FrontRow:
    """A row of results as a point of a plot, at its counted cost, which is the same on every machine."""
    return FrontRow(
        name=row_name(row),
        method=row["method"],
        num_inputs=row["num_inputs"],
        prefill_layers=row["prefill_layers"],
        infonce_weight=math.nan,
        accuracy=row["accuracy_mean"],
        siso_accuracy=row["siso_accuracy"],
        cost_counted=row["cost_counted"],
        accuracy_std=row["accuracy_std"] or 0.0,
    )


def comparison_table(rows: Sequence[Row]) -> str:
    """A Markdown table, most expensive row first; a dash marks what was not measured."""
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
