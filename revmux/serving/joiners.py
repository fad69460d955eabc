"""The inputs of other tasks that join a pass: full groups first, because an input of a wider group costs less.

If more inputs wait than a pass can hold, those that do not fill a group join only if half of the pass is left. Otherwise they
wait for more inputs of their task, at the latest until its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from revmux.serving.limits import Limits
from revmux.serving.part import Part, Share, claim, is_exact, pass_of, prefill_layers
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.scheduling import PLAIN, STRETCH
from revmux.serving.task import Task


class Joiners:
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
        self._is_fixed = first.is_plain and is_exact(first.task, limits)
        lengths = [max(ticket.length for ticket in members) for _, members in first.shares]
        self._shortest, self._longest = min(lengths), max(lengths)  # the longest members of the groups

    def parts(self) -> list[Part]:
        """Claim the tickets that join, as far as their groups can go on from the states of the first part's layers."""
        route = self._first.shares[0][0]
        if route != PLAIN and not prefill_layers(self._first.lineup, route):
            return []  # the states depend on the slot, or no layer is shared
        asked: dict[Task, list[Ticket]] = {}  # for the same texts
        for ticket in self._first.tickets:
            for other in ticket.joint:
                asked.setdefault(other.task, []).append(other)
        has_queue = self._waiting > self._limits.max_batch  # some inputs wait for another pass in any case
        found = self._sweep(asked, only_full=has_queue)
        if has_queue and self._room > self._limits.max_batch / 2:
            found += self._sweep(asked, only_full=False)
        return found

    def _sweep(self, asked: Mapping[Task, Sequence[Ticket]], only_full: bool) -> list[Part]:
        """Claim tickets of every task, in the order of their turns."""
        found: list[Part] = []
        for task in self._queue.turns():
            if task is self._first.task or not self._room:
                continue
            has_base = self._first.is_plain and self._first.task.has_base_of(task)
            common = self._first.task.layers_in_common(task)
            if common or has_base:
                found += self._parts_of(task, common, has_base, asked.get(task, []), only_full)
        return found

    def _parts_of(
        self, task: Task, common: int, has_base: bool, asked: Sequence[Ticket], only_full: bool
    ) -> list[Part]:
        """Claim tickets of one task.

        Args:
            task: the task.
            common: number of lowest layers that it has in common with the first part's task.
            has_base: whether it has the same base, so that all layers can run in one batch.
            asked: its tickets with texts of the first part.
            only_full: whether groups with vacant slots and without such a ticket are left out.
        """
        tickets = self._queue.waiting(asked)
        same = set(tickets)
        has_groups = len(task.lineup.routes) > 1
        if (
            not self._is_fixed
            and (has_groups or has_base or self._limits.share_plain)
            and task.pads_like(self._first.task)
        ):
            tickets += [ticket for ticket in self._queue.first(task, self._room) if ticket not in same]
        tickets = tickets[: self._room]
        lineup = task.lineup
        found = []
        while tickets:
            forward = pass_of(tickets, self._waiting, lineup, self._limits)
            groups = [(group.route, [tickets[index] for index in group.members]) for group in forward.groups]
            tried = {ticket for _, members in groups for ticket in members}
            depth = common if forward.stem == PLAIN.stem else prefill_layers(lineup, groups[0][0])
            if only_full:
                groups = [group for group in groups if len(group[1]) == group[0].width or not same.isdisjoint(group[1])]
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
        return claim(self._queue, [group for group in groups if self._admit(group[1], has_base)])

    def _exact_part(self, part: Part) -> Part | None:
        """Claim the inputs of a plain part that have the texts of the first part, if they are all of the trunk's texts.

        Only then does every layer run the same batch as without sharing, and scores are equal bit for bit.
        """
        shares = [share for share in part.shares if id(share[1][0].tokens) in self._joint]
        texts = {id(share[1][0].tokens) for share in shares}
        if len(shares) > self._room or texts != self._rows:
            return None
        claimed = claim(self._queue, shares)
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
