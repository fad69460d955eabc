"""The tables of the section on serving: figures against their targets, then the shares of a request's time."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import verdict

Row = dict[str, Any]


def figures_table(rows: list[Row]) -> str:
    """Return a table with one row per ratio."""
    lines = ["| ratio | target | median (min–max) | measured of counted speed-up | result |", "|---|---|---|---|---|"]
    for row in rows:
        sign = "≤" if row.get("bound") == "at most" else "≥"
        target = "–" if row["target"] is None else f"{sign} {row['target']:g}"
        found = "–"
        if row["ratio_median"] is not None:
            found = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
        speedup = row.get("throughput_ratio")
        faster = "–" if speedup is None else f"{speedup:.2f}× of {1 / row['cost_counted']:.2f}×"
        lines.append(f"| {row['name']} | {target} | {found} | {faster} | {verdict(row)} |")
    return "\n".join(lines)


def shares_table(rows: list[Row]) -> str:
    """Return a table with one row per load and one column per part of a request's time."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    loads = dict.fromkeys((row["backbone"], row["load"]) for row in rows)
    lines = [f"| backbone, load | {' | '.join(parts)} |", f"|---|{'---|' * len(parts)}"]
    for backbone, load in loads:
        own = {row["part"]: row["ratio_median"] for row in rows if (row["backbone"], row["load"]) == (backbone, load)}
        cells = [f"{100 * own[part]:.1f}%" if part in own else "–" for part in parts]
        lines.append(f"| {backbone}, {load} | {' | '.join(cells)} |")
    return "\n".join(lines)


def serving_words(result: Row) -> dict[str, str]:
    """Return the text for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    machine, settings = meta["machine"], meta["settings"]
    ratios = [row for row in rows if "part" not in row]
    held = [verdict(row) for row in ratios if row["target"] is not None and row["ratio_median"] is not None]
    how = (
        f"{held.count('met')} of {len(held)} targets met. {settings['pairs']} pairs of runs per ratio. {machine['cores']} cores, of which "
        f"each server's model uses {settings['threads']}; the load generator runs on the same machine; torch {meta['versions']['torch']}, "
        f"ray {meta['versions']['ray']}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    shares = shares_table([row for row in rows if "part" in row])
    return {"serving": f"{figures_table(ratios)}\n\n{how}\n\nWhere the time of a request goes:\n\n{shares}\n"}


def path_words(result: Row) -> dict[str, str]:
    """Return the text for the mark of the request path."""
    meta, rows = result["meta"], result["rows"]
    lines = [
        "| figure | target | median (min–max) | CPU ms per request: replica (or front ends + engine), proxy | result |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        sign = "≤" if row.get("bound") == "at most" else "≥"
        target = "–" if row["target"] is None else f"{sign} {row['target']:g}"
        figures = "–".join(f"{row[key]:.4g}" for key in ("ratio_min", "ratio_max"))
        spent = _cpu_time(row["cpu_ms"]) if "cpu_ms" in row else "–"
        lines.append(f"| {row['name']} | {target} | {row['ratio_median']:.4g} ({figures}) | {spent} | {verdict(row)} |")
    before = f" **before** is commit `{meta['before'][:8]}`." if meta["before"] else ""
    how = (
        f"{meta['legs']} runs of wrk per figure, the servers in turn. {meta['machine']['cores']} cores, shared with wrk; "
        f"ray {meta['versions']['ray']}, commit `{(meta['commit'] or 'unknown')[:8]}`.{before}"
    )
    table = "\n".join(lines)
    named = {row["name"]: row for row in rows}
    shares = [
        _shares(row, named[row["name"].removesuffix(", 2 front ends")])
        for row in rows
        if "engine" in row.get("cpu_ms", {})
    ]
    return {"serving-path": "\n\n".join([table, how, *shares]) + "\n"}


def _cpu_time(spent: dict[str, float]) -> str:
    """CPU milliseconds per request of the replica, or of its front ends and its engine, and of the proxy."""
    replica = [f"{spent[kind]:.2f}" for kind in ("replica", "front_ends", "engine") if kind in spent]
    return f"{' + '.join(replica)}, {spent['proxy']:.2f}"


def _shares(row: Row, alone: Row) -> str:
    """What limits front ends, their engine, and a process that does both, by CPU time.

    Args:
        row: the row of a server with front ends.
        alone: the row of the same server in one process.
    """
    front_end, engine, one = (
        row["cpu_ms"]["front_ends"],
        _without_model(row, "engine"),
        _without_model(alone, "replica"),
    )
    limits = [f"{1000 / spent:.0f}" for spent in (one, front_end, engine)]
    return (
        f"Not counting the model's thread, a request with {row['texts']} text{'s' * (row['texts'] > 1)} takes {one:.2f} ms of CPU "
        f"time in one process, or {front_end:.2f} ms in a front end and {engine:.2f} ms in the engine. These parts alone limit "
        f"one process to {limits[0]} requests per second, each front end to {limits[1]}, and an engine to {limits[2]}."
    )


def _without_model(row: Row, process: str) -> float:
    """CPU milliseconds per request of a process besides the thread of the model."""
    spent: float = row["cpu_ms"][process] - row["engine_ms"] * row["texts"]
    return spent
