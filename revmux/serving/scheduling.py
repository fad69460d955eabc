"""Form groups and forward passes from waiting inputs. Arithmetic only, no tensors.

The unit of cost is one input in the plain model. A route is one way to run inputs: alone through the plain model, alone
with an exit head, or in groups of N. Routes are ordered by width, each with a lower cost per input than the one before.
The number of waiting inputs decides up to which route the inputs may use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from revmux.errors import UserError
from revmux.methods import Siso

STRETCH = 2.0
"""Padding makes no group of a served pass longer than this many times its own length."""


@dataclass(frozen=True)
class Route:
    """One way to run inputs.

    Attributes:
        width: N; 1 is the plain model or an exit head.
        stem: name of the prefill. Groups of routes with the same stem can share one forward pass.
        alone: cost per distinct input of the layers that run before inputs are combined.
        shared: cost per group of the layers that run after, regardless of the number of distinct inputs in its slots.
        method: name of the method; ``siso`` is the plain model.
    """

    width: int
    stem: str
    alone: float
    shared: float
    method: str = "revmux"

    @property
    def per_input(self) -> float:
        """Cost per input in a full group."""
        return self.alone + self.shared / self.width

    def group_cost(self, members: int) -> float:
        """Cost of one group of ``members`` distinct inputs."""
        return members * self.alone + self.shared

    def within(self, max_multiplex: int | None) -> bool:
        """Whether a limit on the width allows this route: 1 allows only the plain model, None allows every route."""
        return self == PLAIN or admits(max_multiplex, self.width)


PLAIN = Route(width=1, stem="plain", alone=1.0, shared=0.0, method=Siso.name)


def admits(max_multiplex: int | None, num_inputs: int) -> bool:
    """Whether a limit on the width allows an adapter of N = ``num_inputs``; 1 allows none, not even an exit head."""
    return max_multiplex is None or 1 < max_multiplex >= num_inputs


class Group(NamedTuple):
    """Inputs that run together in the N slots of one group.

    Attributes:
        route: the route of the group.
        members: indices of 1..N distinct inputs. If there are fewer than N, they repeat to fill the remaining slots.
    """

    route: Route
    members: tuple[int, ...]

    @property
    def width(self) -> int:
        """N."""
        return self.route.width


@dataclass(frozen=True)
class ForwardPass:
    """Groups that run together and are prefilled as one batch.

    Attributes:
        stem: the stem of their routes, see :class:`Route`.
        groups: groups of one or several widths.
    """

    stem: str
    groups: tuple[Group, ...]


def useful_routes(routes: Sequence[Route]) -> list[Route]:
    """Return the plain route and each route with a lower cost per input than all narrower ones, narrowest first.

    Raises:
        UserError: two adapters have the same width.
    """
    kept = [PLAIN]
    widths: set[int] = set()
    for route in sorted(routes, key=lambda route: route.width):
        if route.width in widths:
            raise UserError(f"two adapters serve N = {route.width}; give one adapter for each N")
        widths.add(route.width)
        if route.per_input < kept[-1].per_input:
            kept.append(route)
    return kept


def choose_routes(waiting: int, routes: Sequence[Route], plain_load: float) -> list[Route]:
    """Return the routes up to the first one that brings the cost of all waiting inputs down to ``plain_load``, or all.

    Args:
        waiting: number of waiting inputs, including those that are about to run.
        routes: routes from :func:`useful_routes`.
        plain_load: cost in plain inputs.
    """
    for count, route in enumerate(routes, 1):
        if waiting * route.per_input <= plain_load:
            return list(routes[:count])
    return list(routes)


def form_groups(lengths: Sequence[int], caps: Sequence[int | None], routes: Sequence[Route]) -> list[Group]:
    """Put every input into one group of the cheapest route that it allows, together with inputs of similar length.

    Inputs are grouped from the longest to the shortest, because the longest member determines the cost of a group. If
    the remaining inputs of a width do not fill a group, they repeat to fill it or move to narrower widths, whichever
    costs less.

    Args:
        lengths: tokens per input.
        caps: widest group that each input allows, see :meth:`Route.within`.
        routes: routes from :func:`choose_routes`.
    """
    allowed = {cap: max(place for place, route in enumerate(routes) if route.within(cap)) for cap in set(caps)}
    best = [allowed[cap] for cap in caps]  # places in routes
    groups: list[Group] = []
    demoted: list[int] = []
    for position in range(len(routes) - 1, -1, -1):
        route = routes[position]
        members = demoted + [index for index, chosen in enumerate(best) if chosen == position]
        members.sort(key=lambda index: -lengths[index])
        left = len(members) % route.width
        full = len(members) - left
        groups += [Group(route, tuple(members[start : start + route.width])) for start in range(0, full, route.width)]
        demoted = members[full:]
        if left and route.group_cost(left) < _narrow_cost(left, routes[:position]):
            groups.append(Group(route, tuple(demoted)))
            demoted = []
    return groups


def _narrow_cost(inputs: int, routes: Sequence[Route]) -> float:
    """Return the lowest cost of ``inputs`` inputs in groups of these routes."""
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
    """Return the forward pass that contains the first input. Other inputs may wait for a later pass.

    Args:
        lengths: tokens per input, in the order in which the inputs should run.
        caps: widest group that each input allows, see :meth:`Route.within`.
        waiting: number of waiting inputs, including those of other tasks.
        routes: routes from :func:`useful_routes`.
        plain_load: see :func:`choose_routes`.
        max_tokens: see :func:`form_passes`.
    """
    groups = form_groups(lengths, caps, choose_routes(waiting, routes, plain_load))
    passes = form_passes(groups, lengths, max_tokens)
    return next(forward for forward in passes if any(0 in group.members for group in forward.groups))


def form_passes(
    groups: Sequence[Group], lengths: Sequence[int], max_tokens: int, stretch: float = STRETCH
) -> list[ForwardPass]:
    """Combine groups into forward passes with one stem each.

    Args:
        groups: groups from :func:`form_groups`.
        lengths: tokens per input.
        max_tokens: maximum number of tokens per pass, including padding. A single group may always run.
        stretch: padding makes no group longer than this many times its own length.
    """
    passes = []
    for stem in dict.fromkeys(group.route.stem for group in groups):
        same = [
            (max([lengths[index] for index in group.members]), group) for group in groups if group.route.stem == stem
        ]
        same.sort(key=lambda pair: -pair[0])
        batch: list[Group] = []
        inputs = longest = 0
        for length, group in same:
            if batch and ((inputs + len(group.members)) * longest > max_tokens or stretch * length < longest):
                passes.append(ForwardPass(stem, tuple(batch)))
                batch, inputs = [], 0
            if not batch:
                longest = length
            batch.append(group)
            inputs += len(group.members)
        if batch:
            passes.append(ForwardPass(stem, tuple(batch)))
    return passes
