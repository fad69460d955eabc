"""Latency: one client without other load, and arrivals at half of the plain model's capacity."""

from __future__ import annotations

import itertools
import random
import statistics

from benchmarks.rows import ratio_row
from benchmarks.serving.servers import Servers
from benchmarks.serving.settings import CUTS, Row
from benchmarks.serving.shares import share_rows, shares

QUIET_TARGET, HALF_TARGET = 1.05, 1.0
CUT = min(CUTS)


def measure_quiet(servers: Servers, pairs: int) -> list[Row]:
    """Measure one client with one request at a time: the server with adapters against the same server at N = 1."""
    workload, requests = servers.workload, servers.workload.sizes.quiet
    plain, free, parts = [], [], []
    servers.ours(1, CUT, connections=1)  # a warm-up: one-time work is not measured
    for _ in range(pairs):
        plain.append(servers.ours(requests, CUT, 1, connections=1).p50)
        before = servers.step_seconds(CUT)
        leg = servers.ours(requests, CUT, connections=1)
        parts.append(shares(leg, before, servers.step_seconds(CUT)))
        free.append(leg.p50)
    name = f"quiet, {workload.name}: p50 with adapters / at N = 1"
    row = ratio_row(name, [ours / alone for alone, ours in zip(plain, free)], QUIET_TARGET)
    row |= {
        "bound": "at most",
        "backbone": workload.name,
        "plain_seconds": round(statistics.median(plain), 4),
        "seconds": round(statistics.median(free), 4),
        "requests": requests,
        "tokens": workload.mean_length,
    }
    return [row, *share_rows(workload.name, "quiet", parts)]


def measure_half_load(servers: Servers, capacity: float, pairs: int) -> list[Row]:
    """Measure Poisson arrivals, the same for both servers: our p99 over that of a plain ``@serve.batch`` deployment.

    Args:
        servers: servers of one backbone.
        capacity: requests per second that our server answers at N = 1 when saturated.
        pairs: pairs of legs.
    """
    workload, requests = servers.workload, servers.workload.sizes.half
    ours, theirs, widths = [], [], []
    servers.ours(1, CUT, connections=1)
    servers.plain_batch(1)
    for seed in range(pairs):
        arrivals = poisson(requests, capacity / 2, seed)
        leg = servers.ours(requests, CUT, arrivals=arrivals)
        ours.append(leg.p99)
        widths.append(leg.mean_header("x-revmux-width"))
        theirs.append(servers.plain_batch(requests, arrivals).p99)
    name = f"half load, {workload.name}: our p99 / that of a plain @serve.batch deployment"
    row = ratio_row(name, [mine / other for mine, other in zip(ours, theirs)], HALF_TARGET)
    row |= {
        "bound": "at most",
        "backbone": workload.name,
        "seconds": round(statistics.median(ours), 4),
        "rival_seconds": round(statistics.median(theirs), 4),
        "mean_width": round(statistics.fmean(widths), 3),
        "requests": requests,
        "per_second": round(capacity / 2, 3),
        "tokens": workload.mean_length,
    }
    return [row]


def poisson(requests: int, per_second: float, seed: int) -> list[float]:
    """Return the seconds of independent arrivals (a Poisson process)."""
    gaps = random.Random(seed)
    return list(itertools.accumulate(gaps.expovariate(per_second) for _ in range(requests)))
