"""The table of the GPU's figures, and what has not been measured."""

from __future__ import annotations

from benchmarks.gpu.sizes import Row


def gpu_words(result: Row) -> dict[str, str]:
    """Return the table for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    lines = [
        "| shape | system | inputs per second | against SISO | cost, counted | share of the peak matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['backbone']} | {row['title']} | {row['inputs_per_second']:.1f} | {row['throughput_ratio']:.2f}× "
        f"| {row['cost_counted']:.2f} | {row['peak_share']:.1%} |"
        for row in rows
        if row.get("throughput_ratio") is not None
    ]
    measured = "\n".join(lines) + "\n\n" if len(lines) > 2 else ""
    for row in rows:
        if row.get("peak_bytes") is not None:
            measured += (
                f"{row['name']}: peak memory {row['peak_bytes'] / 2**30:.1f} GiB, estimated "
                f"{row['estimated_bytes'] / 2**30:.1f} GiB ({row['peak_of_estimate']:.2f} of it).\n\n"
            )
    missing: dict[str, list[str]] = {}
    for row in rows:
        if "why" in row:
            missing.setdefault(row["why"], []).append(row["name"])
    measured += "".join(f"Not measured ({why}): {'; '.join(names)}.\n\n" for why, names in missing.items())
    machine = meta["machine"]
    return {
        "gpu": f"{measured}{machine['gpu'] or 'no GPU'}, torch {meta['versions']['torch']}, commit `{(meta['commit'] or 'unknown')[:8]}`.\n"
    }
