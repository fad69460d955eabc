"""Who rides with whom: from the inputs that were taken to groups and forward passes. Arithmetic only, no tensors.

Costs are in units of one plain input. A route is one way to run inputs; the plain model is the route of width 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from revmux.errors import UserError


@dataclass(frozen=True)
class Route:
    """One group width, as far as planning goes.

    Attributes:
        width: N.
        stem: routes with the same stem share the layers below the cut, and so a forward pass.
        alone: cost of each distinct input before the shared part.
        shared: cost of one group's shared part, however many of its slots hold distinct inputs.
    """

    width: int
    stem: str
    alone: float
    shared: float

    @property
    def per_input(self) -> float:
        """Cost of an input in a full group."""
        return self.alone + self.shared / self.width

    def group_cost(self, members: int) -> float:
        """Cost of one group of ``members`` distinct inputs."""
        return members * self.alone + self.shared


PLAIN = Route(width=1, stem="plain", alone=1.0, shared=0.0)


@dataclass(frozen=True)
class Group:
    """Inputs that share a pass.

    Attributes:
        width: N.
        members: indices of 1..N distinct inputs; where fewer than N, they fill the remaining slots again.
    """

    width: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class ForwardPass:
    """Groups that run together, below the cut as one batch.

    Attributes:
        stem: what they share, see :class:`Route`.
        groups: of one or several widths.
    """

    stem: str
    groups: tuple[Group, ...]


def useful_routes(routes: Sequence[Route]) -> list[Route]:
    """The plain route and those that are cheaper an input than every narrower one, narrowest first.

    Raises:
        UserError: two routes of one width, or one of width 1.
    """
    kept = [PLAIN]
    widths: set[int] = set()
    for route in sorted(routes, key=lambda route: route.width):
        if route.width < 2:
            raise UserError(f"an adapter serves N = {route.width}, which is the plain model itself; leave it out")
        if route.width in widths:
            raise UserError(f"two adapters serve N = {route.width}; name one for each N")
        widths.add(route.width)
        if route.per_input < kept[-1].per_input:
            kept.append(route)
    return kept


def choose_width(waiting: int, routes: Sequence[Route], plain_load: float) -> int:
    """The narrowest width at which all that waits costs no more than ``plain_load`` plain inputs, else the widest.

    Args:
        waiting: inputs in the queue, those included that are about to run.
        routes: as :func:`useful_routes` gives them.
        plain_load: in plain inputs.
    """
    for route in routes:
        if waiting * route.per_input <= plain_load:
            return route.width
    return routes[-1].width


def form_groups(lengths: Sequence[int], caps: Sequence[int], width: int, routes: Sequence[Route]) -> list[Group]:
    """Every input into one group, with others of like length, no wider than ``width`` and its own cap.

    The longest share a group first, since a group pays for its longest member. Inputs that are left over at one
    width fill a group with themselves, or go on to the narrower widths, whichever is counted cheaper.

    Args:
        lengths: tokens of each input.
        caps: widest group that each input allows.
        width: as :func:`choose_width` gives it.
        routes: as :func:`useful_routes` gives them.
    """
    usable = [route for route in routes if route.width <= width]
    best = [max(route.width for route in usable if route.width <= cap) for cap in caps]
    groups: list[Group] = []
    demoted: list[int] = []
    for place in range(len(usable) - 1, -1, -1):
        route = usable[place]
        members = demoted + [index for index, own in enumerate(best) if own == route.width]
        members.sort(key=lambda index: -lengths[index])
        left = len(members) % route.width
        full = len(members) - left
        groups += [
            Group(route.width, tuple(members[start : start + route.width])) for start in range(0, full, route.width)
        ]
        demoted = members[full:]
        if left and route.group_cost(left) < _narrow_cost(left, usable[:place]):
            groups.append(Group(route.width, tuple(demoted)))
            demoted = []
    return groups


def _narrow_cost(inputs: int, routes: Sequence[Route]) -> float:
    """The least that ``inputs`` inputs cost in groups of these routes."""
    cost = [0.0]
    for count in range(1, inputs + 1):
        cost.append(
            min(
                (cost[count - min(count, route.width)] + route.group_cost(min(count, route.width)) for route in routes),
                default=float("inf"),
            )
        )
    return cost[-1]


def next_pass(
    lengths: Sequence[int],
    caps: Sequence[int],
    waiting: int,
    routes: Sequence[Route],
    plain_load: float,
    max_tokens: int,
) -> ForwardPass:
    """The forward pass that the first of the inputs rides in; the others may wait for the next one.

    Args:
        lengths: tokens of each input, in the order of their turns.
        caps: widest group that each allows.
        waiting: inputs in the queue, those of other tasks included.
        routes: as :func:`useful_routes` gives them.
        plain_load: see :func:`choose_width`.
        max_tokens: see :func:`form_passes`.
    """
    width = choose_width(waiting, routes, plain_load)
    groups = form_groups(lengths, caps, width, routes)
    stems = {route.width: route.stem for route in routes}
    passes = form_passes(groups, lengths, stems, max_tokens)
    return next(forward for forward in passes if any(0 in group.members for group in forward.groups))


def form_passes(
    groups: Sequence[Group], lengths: Sequence[int], stems: dict[int, str], max_tokens: int
) -> list[ForwardPass]:
    """Groups into forward passes: one stem each, like lengths, padding at most doubles them.

    Args:
        groups: as :func:`form_groups` gives them.
        lengths: tokens of each input.
        stems: stem of each width.
        max_tokens: inputs times longest input that one pass may hold; one group always may run.
    """
    passes = []
    for stem in dict.fromkeys(stems.values()):
        same = [group for group in groups if stems[group.width] == stem]
        same.sort(key=lambda group: -max(lengths[index] for index in group.members))
        batch: list[Group] = []
        inputs = longest = 0
        for group in same:
            own = max(lengths[index] for index in group.members)
            if batch and ((inputs + len(group.members)) * longest > max_tokens or 2 * own < longest):
                passes.append(ForwardPass(stem, tuple(batch)))
                batch, inputs = [], 0
            if not batch:
                longest = own
            batch.append(group)
            inputs += len(group.members)
        if batch:
            passes.append(ForwardPass(stem, tuple(batch)))
    return passes
