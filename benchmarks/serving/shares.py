"""Shares of a request's time, from the client's timing, the reply's headers, and the seconds of the forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.rows import ratio_row
from benchmarks.serving.load import Leg
from benchmarks.serving.settings import Row

PARTS = ("proxy", "queue", "tokenise", "plain", "prefill", "multiplex", "upper", "head", "reply")
"""``plain`` is the whole model at N = 1, which is not split into stages."""


def shares(leg: Leg, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the mean share of each part of :data:`PARTS` in the time of a request; the shares sum to 1.

    Args:
        leg: replies of our server, one input each.
        before: seconds of its forward passes by stage, before the leg.
        after: the same after the leg.

    Time spent in neither the model nor the queue counts as ``proxy`` outside the replica (client, network, Serve's
    proxy) and as ``reply`` inside it.
    """
    seconds = sum(reply.seconds for reply in leg.replies) / len(leg.replies)
    total, tokenise, queue, inference = (
        leg.mean_header(f"x-{name}-time") / 1000 for name in ("total", "tokenization", "queue", "inference")
    )
    spent = {stage: after[stage] - before.get(stage, 0.0) for stage in after if stage not in ("tokenize", "queue")}
    whole = sum(spent.values())
    passes = {stage: inference * value / whole for stage, value in spent.items()}
    found = dict.fromkeys(PARTS, 0.0) | {
        "proxy": seconds - total,
        "queue": queue,
        "tokenise": tokenise + passes.pop("pad", 0.0),
        "reply": total - tokenise - queue - inference + passes.pop("reply", 0.0),
    }
    for stage, value in passes.items():
        found[stage] += value
    return {part: value / seconds for part, value in found.items()}


def share_rows(workload: str, when: str, legs: Sequence[Mapping[str, float]]) -> list[Row]:
    """Return a row for each part whose share is not zero.

    Args:
        workload: name of the backbone.
        when: name of the load.
        legs: results of :func:`shares`, at least one.
    """
    return [
        ratio_row(f"share of {part}, {workload}, {when}", [leg[part] for leg in legs])
        | {"backbone": workload, "part": part, "load": when}
        for part in PARTS
        if any(leg[part] for leg in legs)
    ]
