"""Over HTTP under saturation: groups against our own N = 1, and our N = 1 against other servers."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.rows import ratio_row, unmeasured_row
from benchmarks.serving.load import Leg
from benchmarks.serving.servers import DidNotStart, Servers
from benchmarks.serving.settings import CUTS, WIDTHS, Row
from benchmarks.serving.shares import share_rows, shares

TARGET, RIVAL_TARGET = 0.9, 1.0
FEW = 4
RIVALS = {"plain": "a plain @serve.batch deployment", "infinity": "infinity-emb"}


def measure_groups(servers: Servers, num_inputs: int, cut: int, pairs: int) -> list[Row]:
    """Return a row for one N and l and, at the largest N and smallest l, rows with the shares of a request's time."""
    workload, sizes = servers.workload, servers.workload.sizes
    plain, grouped, widths, parts = [], [], [], []
    servers.ours(num_inputs, cut, num_inputs)  # a warm-up: one-time work is not measured
    for _ in range(pairs):
        plain.append(servers.ours(sizes.plain, cut, 1).per_second)
        before = servers.step_seconds(cut)
        leg = servers.ours(sizes.grouped, cut, num_inputs)
        parts.append(shares(leg, before, servers.step_seconds(cut)))
        grouped.append(leg.per_second)
        widths.append(leg.mean_header("x-revmux-width"))
    counted = workload.counted_speedup(num_inputs, cut)
    ratios = [ours / alone for alone, ours in zip(plain, grouped)]
    name = f"over HTTP, {workload.name}, N = {num_inputs}, l = {cut}: measured / counted speed-up"
    row = ratio_row(name, [ratio / counted for ratio in ratios], TARGET if workload.has_targets else None)
    row |= {
        "backbone": workload.name,
        "num_inputs": num_inputs,
        "prefill_layers": cut,
        "cost_counted": round(1 / counted, 4),
        "throughput_ratio": round(statistics.median(ratios), 3),
        "plain_per_second": round(statistics.median(plain), 3),
        "grouped_per_second": round(statistics.median(grouped), 3),
        "mean_width": round(statistics.fmean(widths), 3),
        "requests": [sizes.plain, sizes.grouped],
        "connections": sizes.connections,
        "tokens": workload.mean_length,
    }
    if (num_inputs, cut) != (max(WIDTHS), min(CUTS)):
        return [row]
    return [row, *share_rows(workload.name, f"saturated, N = {num_inputs}, l = {cut}", parts)]


def measure_rival(servers: Servers, rival: str, pairs: int) -> list[Row]:
    """Compare our server at N = 1 with another server, by requests per second."""
    workload, sizes = servers.workload, servers.workload.sizes
    name = f"over HTTP, {workload.name}: our N = 1 / {RIVALS[rival]}"
    target = RIVAL_TARGET if workload.has_targets else None
    if rival == "infinity" and servers.settings.infinity is None:
        why = "no environment with infinity-emb was named: --infinity PATH/bin/infinity_emb"
        return [unmeasured_row(name, why, target)]
    legs: dict[str, Callable[[int], Leg]] = {"plain": servers.plain_batch, "infinity": servers.infinity}
    try:
        for leg in (legs[rival], servers.plain_model):
            leg(FEW)  # a warm-up: one-time work is not measured
        pairs_of = [
            (servers.plain_model(sizes.rivals).per_second, legs[rival](sizes.rivals).per_second) for _ in range(pairs)
        ]
    except DidNotStart as error:
        return [unmeasured_row(name, str(error), target)]
    row = ratio_row(name, [ours / theirs for ours, theirs in pairs_of], target)
    row |= {
        "backbone": workload.name,
        "plain_per_second": round(statistics.median(ours for ours, _ in pairs_of), 3),
        "rival_per_second": round(statistics.median(theirs for _, theirs in pairs_of), 3),
        "requests": sizes.rivals,
        "connections": sizes.connections,
        "tokens": workload.mean_length,
    }
    return [row]
