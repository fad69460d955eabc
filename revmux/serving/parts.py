"""Which inputs of which tasks run together in the next pass.

A pass begins with the input that is next and the inputs of its task that can share the pass. Waiting inputs of other
tasks join it if their groups can go on from the states of the same lowest layers, see :mod:`revmux.serving.trunk`. Each
task then forms its own groups and runs its own upper layers. Plain inputs of tasks that differ from one base by low-rank
updates alone run their upper layers in one batch, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from revmux.backbone.low_rank import LowRankMap
from revmux.serving.joiners import Joiners
from revmux.serving.limits import Limits
from revmux.serving.part import Part, claim, is_exact, pass_of, prefill_layers
from revmux.serving.queue import PullQueue, Ticket, Window
from revmux.serving.scheduling import PLAIN
from revmux.serving.task import Task
from revmux.serving.trunk import Branches, Trunk


def next_parts(queue: PullQueue, limits: Limits, window: Window) -> tuple[list[Part], Trunk | None]:
    """Claim the tickets of the next pass, which contains the first ticket of a window.

    Returns:
        The parts of the pass, one or more per task, and the trunk if there are several. No part if the tickets were
        cancelled meanwhile.

    Raises:
        Exception: the tickets of the window cannot be grouped. Then none is claimed.
    """
    tickets = window.tickets
    task, lineup = tickets[0].task, tickets[0].task.lineup
    forward = pass_of(tickets, window.waiting, lineup, limits)
    groups = [(group.route, [tickets[index] for index in group.members]) for group in forward.groups]
    if forward.stem == PLAIN.stem and is_exact(task, limits):  # shared only if every task answers all of its texts
        same = _tasks(tickets[0])
        groups = [(route, members) for route, members in groups if _tasks(members[0]) == same]
    first = Part(task, lineup, claim(queue, groups))
    others = Joiners(queue, limits, first, window.waiting).parts() if first.shares else []
    for ticket in (ticket for part in (first, *others) for ticket in part.tickets):
        ticket.joint = ()  # otherwise the tickets of a text would keep each other in memory
    parts = [first, *others] if first.shares else []
    if not any(part.is_on_trunk for part in others):
        return parts, None
    deepest = max(part.depth for part in others)
    parts[0] = replace(first, depth=prefill_layers(lineup, first.shares[0][0]) or deepest)
    parts, branches = _with_branches(parts)
    on_trunk = [part for part in parts if part.is_on_trunk]
    rows = [ticket.tokens for part in on_trunk for ticket in part.tickets]
    return parts, Trunk(rows, task.padder, [part.depth for part in on_trunk], branches)


def _with_branches(parts: Sequence[Part]) -> tuple[list[Part], Branches | None]:
    """Let the first part and those that have its base run their upper layers in one batch."""
    base = parts[0].task.pretrained.base
    if base is None or all(part.first_branch is None for part in parts):
        return list(parts), None
    depth = min(part.depth for part in parts if part.first_branch is not None)
    found: list[Part] = []
    inputs: list[dict[str, list[int]]] = []
    updates: list[Mapping[str, LowRankMap]] = []
    for number, part in enumerate(parts):
        if number and part.first_branch is None:
            found.append(part)
            continue
        assert part.task.updates is not None
        found.append(replace(part, depth=depth, first_branch=len(inputs)))
        inputs += [ticket.tokens for ticket in part.tickets]
        updates += [part.task.updates] * len(part.tickets)
    return found, Branches(base, depth, inputs, updates)


def _tasks(ticket: Ticket) -> set[Task]:
    """The tasks that answer the text of a ticket; empty if there is only one."""
    return {other.task for other in ticket.joint}
