"""The table of the section on GLUE: how much of the task model's accuracy each system keeps."""

from __future__ import annotations

from typing import Any


def glue_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    budget, data, machine = meta["budget"], meta["data"], meta["machine"]
    lines = ["| task | system | N | cost, counted | accuracy on dev | points lost |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {100 * row['accuracy_std']:.1f}" if row["seeds"] > 1 else ""
        lines.append(
            f"| {row['task']} | {row['title']} | {row['num_inputs']} | {row['cost_counted']:.2f} "
            f"| {100 * row['accuracy_mean']:.1f}{spread} | {100 * (row['siso_accuracy'] - row['accuracy_mean']):.1f} |"
        )
    seeds = max(row["seeds"] for row in rows)
    sizes = ", ".join(f"{name} {identity['train']:,} of {identity['available']:,}" for name, identity in data.items())
    how = (
        f"Training sentences used: {sizes}. Adapters train for {budget['epochs']} epochs, exit heads for {3 * budget['epochs']}. {seeds} "
        f"seeds × {budget['shuffles']} shuffles of dev; ± is the spread over seeds. The checkpoint is chosen on a slice of train. "
        f"{machine['cores']} cores, torch {meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    return {"glue": "\n".join(lines) + f"\n\n{how}\n"}
