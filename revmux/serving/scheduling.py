"""Who rides with whom: from the inputs that were taken to groups and forward passes. Arithmetic only, no tensors.

Costs are in units of one plain input. A route is one way to run inputs: alone through the plain model, alone with an
exit head, or in groups of N. Each route that may run is cheaper an input than the ones before it, and the queue decides
how far to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from revmux.errors import UserError
from revmux.methods import Siso


@dataclass(frozen=True)
class Route:
    """One way to run inputs, as the scheduler sees it.

    Attributes:
        width: N; 1 is the plain model or an exit head.
        stem: routes with the same stem share the layers below the cut, and so a forward pass.
        alone: cost of each distinct input before the shared part.
        shared: cost of one group's shared part, however many of its slots hold distinct inputs.
        method: name of the method; ``siso`` is the plain model.
    """

    width: int
    stem: str
    alone: float
    shared: float
    method: str = "revmux"

    @property
    def per_input(self) -> float:
        """Cost of an input in a full group."""
        return self.alone + self.shared / self.width

    def group_cost(self, members: int) -> float:
        """Cost of one group of ``members`` distinct inputs."""
        return members * self.alone + self.shared

    def within(self, max_multiplex: int | None) -> bool:
        """Whether a bound on the width admits the route: 1 demands the plain model, None admits everything."""
        return self == PLAIN or admits(max_multiplex, self.width)


PLAIN = Route(width=1, stem="plain", alone=1.0, shared=0.0, method=Siso.name)


def admits(max_multiplex: int | None, num_inputs: int) -> bool:
    """Whether a bound on the width admits an adapter of N = ``num_inputs``; 1 admits none, not even an exit head."""
    return max_multiplex is None or 1 < max_multiplex >= num_inputs


@dataclass(frozen=True)
class Group:
    """Inputs that share a pass.

    Attributes:
        route: how they run.
        members: indices of 1..N distinct inputs; where fewer than N, they fill the remaining slots again.
    """

    route: Route
    members: tuple[int, ...]

    @property
    def width(self) -> int:
        """N."""
        return self.route.width


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
    """The plain route and those of adapters that are cheaper an input than every narrower one, narrowest first.

    Raises:
        UserError: two adapters of one width.
    """
    kept = [PLAIN]
    widths: set[int] = set()
    for route in sorted(routes, key=lambda route: route.width):
        if route.width in widths:
            raise UserError(f"two adapters serve N = {route.width}; name one for each N")
        widths.add(route.width)
        if route.per_input < kept[-1].per_input:
            kept.append(route)
    return kept


def choose_routes(waiting: int, routes: Sequence[Route], plain_load: float) -> list[Route]:
    """As many routes, from the plain one on, as bring the cost of all that waits to ``plain_load`` plain inputs, or all.

    Args:
        waiting: inputs in the queue, those included that are about to run.
        routes: as :func:`useful_routes` gives them.
        plain_load: in plain inputs.
    """
    for place, route in enumerate(routes, 1):
        if waiting * route.per_input <= plain_load:
            return list(routes[:place])
    return list(routes)


def form_groups(lengths: Sequence[int], caps: Sequence[int | None], routes: Sequence[Route]) -> list[Group]:
    """Every input into one group of the cheapest route that it admits, with others of like length.

    The longest share a group first, since a group pays for its longest member. Inputs that are left over at one
    width fill a group with themselves, or go on to the narrower widths, whichever is counted cheaper.

    Args:
        lengths: tokens of each input.
        caps: what each input allows, see :meth:`Route.within`.
        routes: as :func:`choose_routes` gives them.
    """
    best = [[route for route in routes if route.within(cap)][-1] for cap in caps]
    groups: list[Group] = []
    demoted: list[int] = []
    for place in range(len(routes) - 1, -1, -1):
        route = routes[place]
        members = demoted + [index for index, own in enumerate(best) if own == route]
        members.sort(key=lambda index: -lengths[index])
        left = len(members) % route.width
        full = len(members) - left
        groups += [Group(route, tuple(members[start : start + route.width])) for start in range(0, full, route.width)]
        demoted = members[full:]
        if left and route.group_cost(left) < _narrow_cost(left, routes[:place]):
            groups.append(Group(route, tuple(demoted)))
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
    caps: Sequence[int | None],
    waiting: int,
    routes: Sequence[Route],
    plain_load: float,
    max_tokens: int,
) -> ForwardPass:
    """The forward pass that the first of the inputs rides in; the others may wait for the next one.

    Args:
        lengths: tokens of each input, in the order of their turns.
        caps: what each allows, see :meth:`Route.within`.
        waiting: inputs in the queue, those of other tasks included.
        routes: as :func:`useful_routes` gives them.
        plain_load: see :func:`choose_routes`.
        max_tokens: see :func:`form_passes`.
    """
    groups = form_groups(lengths, caps, choose_routes(waiting, routes, plain_load))
    passes = form_passes(groups, lengths, max_tokens)
    return next(forward for forward in passes if any(0 in group.members for group in forward.groups))


def form_passes(groups: Sequence[Group], lengths: Sequence[int], max_tokens: int) -> list[ForwardPass]:
    """Groups into forward passes: one stem each, like lengths, padding at most doubles them.

    Args:
        groups: as :func:`form_groups` gives them.
        lengths: tokens of each input.
        max_tokens: inputs times longest input that one pass may hold; one group always may run.
    """
    passes = []
    for stem in dict.fromkeys(group.route.stem for group in groups):
        same = [group for group in groups if group.route.stem == stem]
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
