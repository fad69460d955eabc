"""The picture of the front: accuracy against cost, one panel per task, with what the plans ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from revmux.utils.files import atomic_file

Row = dict[str, Any]
LOOKS = {
    "siso": ("SISO (the plain model)", "*", "black"),
    "exit-head": ("exit head", "s", "tab:orange"),
    "skip-only": ("skip-only control", "x", "tab:gray"),
    "revmux": ("RevMUX", "o", "tab:blue"),
    "token-split": ("token split", "^", "tab:green"),
    "vanilla-adapter": ("vanilla adapter", "D", "tab:purple"),
    "only-multiplexer-reversible": ("only multiplexer reversible", "d", "tab:pink"),
    "rival": ("rivals that are not adapters", "+", "tab:brown"),
}


def plot_front(rows: list[Row], path: Path) -> None:
    """Plot the rows of a result file; the file is written atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.4), layout="constrained", squeeze=False)
    for panel, task in zip(axes[0], tasks):
        own = [row for row in rows if row["task"] == task]
        for method, (title, marker, color) in LOOKS.items():
            members = [
                row for row in own if row["table"] == "front" and row["method"] == method and row["cost_counted"]
            ]
            if members:
                panel.errorbar(
                    [row["cost_counted"] for row in members],
                    [100 * row["accuracy_mean"] for row in members],
                    yerr=[100 * (row["accuracy_std"] or 0.0) for row in members],
                    fmt=marker,
                    color=color,
                    markersize=7,
                    capsize=2,
                    alpha=0.85,
                    label=title,
                )
        for systems, marker, color in (("all systems", "P", "tab:red"), ("without multiplexing", "P", "tab:olive")):
            plans = [row for row in own if row["table"] == "plan" and row["systems"] == systems and row["stages"]]
            plans.sort(key=lambda row: row["cost_counted"])
            panel.plot(
                [row["cost_counted"] for row in plans],
                [100 * row["accuracy_mean"] for row in plans],
                marker=marker,
                color=color,
                linewidth=1,
                label=f"plans, {systems}",
            )
        siso = next((row["siso_accuracy"] for row in own), None)
        if siso is not None:
            panel.axhline(100 * siso, color="black", linewidth=0.6, linestyle=":")
            panel.set_ylim(bottom=max(panel.get_ylim()[0], 100 * siso - 15))
        panel.set_title(task)
        panel.set_xlabel("cost of an input relative to SISO, counted (left is cheaper)")
    axes[0][0].set_ylabel("accuracy on the test split (%)")
    handles: dict[str, Any] = {}
    for panel in axes[0]:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
