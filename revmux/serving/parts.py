"""Which inputs of which tasks run together in the next pass.

A pass begins with the input that is next and the inputs of its task that can share the pass. Waiting inputs of other
tasks join it if their groups can go on from the states of the same lowest layers, see :mod:`revmux.serving.trunk`. Each
task then forms its own groups and runs its own upper layers. Plain inputs of tasks that differ from one base by low-rank
updates alone run their upper layers in one batch, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from revmux.backbone.low_rank import LowRankMap
from revmux.serving.limits import Limits
from revmux.serving.queue import PullQueue, Ticket, Window
from revmux.serving.scheduling import PLAIN, STRETCH, ForwardPass, Group, Route, next_pass
from revmux.serving.task import Lineup, Task
from revmux.serving.trunk import Branches, Trunk

Share = tuple[Route, list[Ticket]]
"""One group: its route through the model, and the tickets of its 1..N distinct members."""


@dataclass(frozen=True)
class Part:
    """What one task runs in a pass.

    Attributes:
        task: the task.
        lineup: its adapters when the pass was formed.
        shares: its groups, at least one.
        depth: number of layers that it leaves to the trunk of the pass.
        first_branch: number of its first input in the branches of the trunk, which run its other layers; None if it runs them
            itself.
    """

    task: Task
    lineup: Lineup
    shares: list[Share]
    depth: int = 0
    first_branch: int | None = None

    @property
    def is_on_trunk(self) -> bool:
        """Whether other tasks can run layers for it."""
        return self.depth > 0 or self.first_branch is not None

    @property
    def tickets(self) -> list[Ticket]:
        """The members of all groups."""
        return [ticket for _, members in self.shares for ticket in members]

    @property
    def is_plain(self) -> bool:
        """Whether the plain model answers."""
        return self.shares[0][0] == PLAIN

    @property
    def depth_cost(self) -> float:
        """Counted cost per input of the layers below ``depth``. In the plain model, all layers count alike."""
        route = self.shares[0][0]
        if route == PLAIN:
            return self.depth / self.task.backbone.num_layers
        return self.lineup.first[route.width].route.alone if self.depth else 0.0


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
    forward = _pass_of(tickets, window.waiting, lineup, limits)
    groups = [(group.route, [tickets[index] for index in group.members]) for group in forward.groups]
    if forward.stem == PLAIN.stem and _is_exact(task, limits):  # shared only if every task answers all of its texts
        same = _tasks(tickets[0])
        groups = [(route, members) for route, members in groups if _tasks(members[0]) == same]
    first = Part(task, lineup, _claim(queue, groups))
    others = _Joiners(queue, limits, first, window.waiting).parts() if first.shares else []
    for ticket in (ticket for part in (first, *others) for ticket in part.tickets):
        ticket.joint = ()  # otherwise the tickets of a text would keep each other in memory
    parts = [first, *others] if first.shares else []
    if not any(part.is_on_trunk for part in others):
        return parts, None
    deepest = max(part.depth for part in others)
    parts[0] = replace(first, depth=_prefill_layers(lineup, first.shares[0][0]) or deepest)
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


def _is_exact(task: Task, limits: Limits) -> bool:
    """Whether plain answers of a task must be those of a batch that the task could run alone.

    With LoRA apart, they differ from the merged model's by rounding in any case.
    """
    return not limits.share_plain and task.updates is None


def _pass_of(tickets: Sequence[Ticket], waiting: int, lineup: Lineup, limits: Limits) -> ForwardPass:
    """The pass of the first ticket."""
    caps, lengths = [ticket.cap for ticket in tickets], [ticket.length for ticket in tickets]
    return next_pass(lengths, caps, waiting, lineup.routes, limits.plain_load, limits.max_batch_tokens)


def _claim(queue: PullQueue, groups: Sequence[Share]) -> list[Share]:
    """Claim the members of groups. If a member was cancelled, the remaining ones of its group fill its slot."""
    claimed = set(queue.claim([ticket for _, members in groups for ticket in members]))
    kept = [(route, [ticket for ticket in members if ticket in claimed]) for route, members in groups]
    return [(route, members) for route, members in kept if members]


class _Joiners:
    """The inputs of other tasks that join a pass.

    Args:
        queue: the queue.
        limits: limits of the engine.
        first: the part of the task whose turn it is.
        waiting: number of waiting tickets of all tasks.
    """

    def __init__(self, queue: PullQueue, limits: Limits, first: Part, waiting: int) -> None:
        self._queue = queue
        self._limits = limits
        self._first = first
        self._waiting = waiting
        tickets = first.tickets
        self._room = limits.max_batch - len(tickets)  # number of tickets that may still join
        self._joint = {id(ticket.tokens) for ticket in tickets}
        self._rows = set(self._joint)  # texts of the trunk
        # A plain answer that is exact needs a trunk with these texts and no others.
        self._is_fixed = first.is_plain and _is_exact(first.task, limits)
        lengths = [max(ticket.length for ticket in members) for _, members in first.shares]
        self._shortest, self._longest = min(lengths), max(lengths)  # the longest members of the groups

    def parts(self) -> list[Part]:
        """Claim the tickets that join, as far as their groups can go on from the states of the first part's layers."""
        route = self._first.shares[0][0]
        if route != PLAIN and not _prefill_layers(self._first.lineup, route):
            return []  # the states depend on the slot, or no layer is shared
        asked: dict[Task, list[Ticket]] = {}  # for the same texts
        for ticket in self._first.tickets:
            for other in ticket.joint:
                asked.setdefault(other.task, []).append(other)
        found: list[Part] = []
        for task in self._queue.turns():
            if task is self._first.task or not self._room:
                continue
            has_base = self._first.is_plain and self._first.task.has_base_of(task)
            common = self._first.task.layers_in_common(task)
            if common or has_base:
                found += self._parts_of(task, common, has_base, asked.get(task, []))
        return found

    def _parts_of(self, task: Task, common: int, has_base: bool, asked: Sequence[Ticket]) -> list[Part]:
        tickets = self._queue.waiting(asked)
        has_groups = len(task.lineup.routes) > 1
        if (
            not self._is_fixed
            and (has_groups or has_base or self._limits.share_plain)
            and task.pads_like(self._first.task)
        ):
            known = set(tickets)
            tickets += [ticket for ticket in self._queue.first(task, self._room) if ticket not in known]
        tickets = tickets[: self._room]
        lineup = task.lineup
        found = []
        while tickets:
            forward = _pass_of(tickets, self._waiting, lineup, self._limits)
            groups = [(group.route, [tickets[index] for index in group.members]) for group in forward.groups]
            tried = {ticket for _, members in groups for ticket in members}
            depth = common if forward.stem == PLAIN.stem else _prefill_layers(lineup, groups[0][0])
            if forward.stem == PLAIN.stem and has_base:
                part: Part | None = Part(task, lineup, self._claim_admitted(groups, True), depth, first_branch=0)
            elif forward.stem == PLAIN.stem and not self._limits.share_plain:
                part = self._exact_part(Part(task, lineup, groups, depth))
            elif 0 < depth <= common:
                part = Part(task, lineup, self._claim_admitted(groups), depth)
            else:
                part = None
            if part is not None and part.shares:
                found.append(part)
            tickets = [ticket for ticket in tickets if ticket not in tried]
        return found

    def _claim_admitted(self, groups: Sequence[Share], has_base: bool = False) -> list[Share]:
        return _claim(self._queue, [group for group in groups if self._admit(group[1], has_base)])

    def _exact_part(self, part: Part) -> Part | None:
        """Claim the inputs of a plain part that have the texts of the first part, if they are all of the trunk's texts.

        Only then does every layer run the same batch as without sharing, and scores are equal bit for bit.
        """
        shares = [share for share in part.shares if id(share[1][0].tokens) in self._joint]
        texts = {id(share[1][0].tokens) for share in shares}
        if len(shares) > self._room or texts != self._rows:
            return None
        claimed = _claim(self._queue, shares)
        self._room -= len(claimed)
        complete = len(claimed) == len(shares)
        self._is_fixed |= complete
        return replace(part, shares=claimed, depth=part.depth if complete else 0)

    def _admit(self, members: Sequence[Ticket], has_base: bool) -> bool:
        """Take room for a group, and return whether there is enough.

        Args:
            members: its inputs.
            has_base: whether the upper layers, too, run in one batch, in which a text has a row for each task.
        """
        rows = self._rows | {id(ticket.tokens) for ticket in members}
        if len(members) > self._room:
            return False
        is_wider = len(rows) > len(self._rows)
        if is_wider or has_base:
            inputs = self._limits.max_batch - self._room + len(members) if has_base else len(rows)
            length = max(ticket.length for ticket in members)
            shortest, longest = min(length, self._shortest), max(length, self._longest)
            is_too_large = inputs * longest > self._limits.max_batch_tokens
            if (self._is_fixed and is_wider) or is_too_large or STRETCH * shortest < longest:
                return False
            self._rows, self._shortest, self._longest = rows, shortest, longest
        self._room -= len(members)
        return True


def _tasks(ticket: Ticket) -> set[Task]:
    """The tasks that answer the text of a ticket; empty if there is only one."""
    return {other.task for other in ticket.joint}


def _prefill_layers(lineup: Lineup, route: Route) -> int:
    """Number of layers that inputs of a group run through as in the plain model; 0 if their states depend on the slot.

    The plain model has no such number, and counts as 0 too.
    """
    if route == PLAIN:
        return 0
    model = lineup.stages[route.width].model
    return 0 if model.method.prepares_tokens else model.prefill_layers


def lay_out(shares: Sequence[Share]) -> tuple[list[Group], list[Ticket]]:
    """Return groups whose members are consecutive rows of one pass, and the tickets in these rows."""
    groups: list[Group] = []
    rows: list[Ticket] = []
    for route, members in shares:
        groups.append(Group(route, tuple(range(len(rows), len(rows) + len(members)))))
        rows += members
    return groups, rows
