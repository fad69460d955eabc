"""Where the time of a request goes, from what the client saw, the reply's headers, and the seconds of the forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.rows import ratio_row
from benchmarks.serving.load import Leg
from benchmarks.serving.settings import Row

PARTS = ("proxy", "queue", "tokenise", "plain", "prefill", "multiplex", "upper", "head", "reply")
"""``plain`` is the whole model at N = 1, which has no cut."""


def shares(leg: Leg, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The mean share of each part of :data:`PARTS` in the time of a request; together 1.

    Args:
        leg: replies of our server, one input each.
        before: seconds of its passes by stage, before the leg.
        after: the same after it.

    What is neither the model's nor the queue's is ``proxy`` outside of the replica (the client, the network, Serve's
    proxy) and ``reply`` within it.
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


def share_rows(place: str, when: str, legs: Sequence[Mapping[str, float]]) -> list[Row]:
    """A row for each part that takes any time.

    Args:
        place: name of the backbone.
        when: under which load.
        legs: what :func:`shares` gave, once or more.
    """
    return [
        ratio_row(f"share of {part}, {place}, {when}", [leg[part] for leg in legs])
        | {"backbone": place, "part": part, "load": when}
        for part in PARTS
        if any(leg[part] for leg in legs)
    ]
