"""The tables of the section on plans: the outcome per allowance, and the time of the sweep."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import verdict
from revmux.methods import method_class

Row = dict[str, Any]


def plan_words(result: Row) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    plans = [row for row in rows if "allowance" in row]
    timed = [row for row in rows if "allowance" not in row]
    lines = [
        "| task | allowance | served system | N | falls back below | promised loss, upper bound | verified loss (interval) | cost, counted "
        "| throughput | outcome |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_plan_line(row) for row in plans),
        "",
        *(f"- {row['task']}, {row['allowance']:g} points: {row['outcome']}." for row in plans),
        *(
            f"- {task}: {_multiplexed(best)}"
            for task, best in {row["task"]: row["multiplexed"] for row in plans}.items()
        ),
        "",
        "| ratio | trials (stopped, per round) | target | median (min–max) | result |",
        "|---|---|---|---|---|",
        *(_time_line(row) for row in timed),
    ]
    sizes = ", ".join(
        f"{name} {data['train']:,} / {data['choosing']:,} / {data['test']:,}" for name, data in meta["data"].items()
    )
    machine = meta["machine"]
    how = (
        f"Losses are in points. Inputs for training / choosing / verification: {sizes}. {machine['cores']} cores, "
        f"torch {meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    return {"plan": "\n".join(lines) + f"\n\n{how}\n"}


def _plan_line(row: Row) -> str:
    threshold = "–" if row["threshold"] is None else f"{row['threshold']:g} ({row['fallback']:.0%} of answers)"
    speed = "–" if row["throughput_ratio"] is None else f"{row['throughput_ratio']:.2f}×"
    system = row["method"] if row["kept"] else f"nothing (chosen: {row['method']})"
    layer = f" l={row['prefill_layers']}" if not method_class(row["method"]).is_plain else ""
    return (
        f"| {row['task']} | {row['allowance']:g} | {system}{layer} | {', '.join(map(str, row['widths']))} | {threshold} "
        f"| {row['promised_loss']:.2f}, {row['promised_bound']:.2f} | {row['verified_loss']:.2f} "
        f"({row['verified_lower']:.2f} to {row['verified_upper']:.2f}) | {row['cost_counted']:.2f} | {speed} "
        f"| {_outcome(row)} |"
    )


def _outcome(row: Row) -> str:
    """Return the words of :class:`revmux.plan.choose.Verification` for the outcome of a row."""
    if row["proven"]:
        return "proven"
    return "not proven" if row["kept"] else "exceeded"


def _multiplexed(best: Row | None) -> str:
    """Describe the best multiplexed system, whether or not it was shipped."""
    if best is None:
        return "no multiplexed system saves anything."
    bound = "" if best["loss_bound"] is None else f", at most {best['loss_bound']:.2f}"
    return (
        f"of the multiplexed systems that save anything, {best['name']} is the safest: it loses {best['loss']:.2f} points on "
        f"the choosing set{bound}, at {1 / best['cost']:.2f} times SISO's throughput."
    )


def _time_line(row: Row) -> str:
    if row["ratio_median"] is None:
        return f"| {row['name']} | – | – | – | {verdict(row)} |"
    target = "–" if row["target"] is None else f"≥ {row['target']:g}"
    seconds = ", ".join(f"{side} {value:.0f} s" for side, value in row["seconds"].items())
    return (
        f"| {row['name']} | {row['trials']} ({', '.join(map(str, row['stopped']))}) | {target} "
        f"| {row['ratio_median']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f}); {seconds} | {verdict(row)} |"
    )
