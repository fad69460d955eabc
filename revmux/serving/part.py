"""What one task runs in a pass: groups of its waiting inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from revmux.serving.limits import Limits
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.scheduling import PLAIN, ForwardPass, Group, Route, next_pass
from revmux.serving.task import Lineup, Task

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


def is_exact(task: Task, limits: Limits) -> bool:
    """Whether plain answers of a task must be those of a batch that the task could run alone.

    With LoRA apart, they differ from the merged model's by rounding in any case.
    """
    return not limits.share_plain and task.updates is None


def pass_of(tickets: Sequence[Ticket], waiting: int, lineup: Lineup, limits: Limits) -> ForwardPass:
    """The pass of the first ticket."""
    caps, lengths = [ticket.cap for ticket in tickets], [ticket.length for ticket in tickets]
    return next_pass(lengths, caps, waiting, lineup.routes, limits.plain_load, limits.max_batch_tokens)


def claim(queue: PullQueue, groups: Sequence[Share]) -> list[Share]:
    """Claim the members of groups. If a member was cancelled, the remaining ones of its group fill its slot."""
    claimed = set(queue.claim([ticket for _, members in groups for ticket in members]))
    kept = [(route, [ticket for ticket in members if ticket in claimed]) for route, members in groups]
    return [(route, members) for route, members in kept if members]


def prefill_layers(lineup: Lineup, route: Route) -> int:
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
