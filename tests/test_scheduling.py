"""Widths and groups from the waiting inputs: the arithmetic alone, and under load on a simulated clock."""

from __future__ import annotations

import pytest

from revmux.errors import UserError
from revmux.serving import Overloaded
from revmux.serving.metrics import Metrics
from revmux.serving.queue import PullQueue, Ticket
from revmux.serving.scheduling import (
    PLAIN,
    Group,
    Route,
    choose_routes,
    form_groups,
    form_passes,
    next_pass,
    useful_routes,
)

# Costs of groups of 2 and 4 over the same cut layer, in plain inputs: 0.7 and 0.5 per input.
TWO = Route(2, "layer 1", 0.4, 0.6)
FOUR = Route(4, "layer 1", 0.4, 0.4)
HEAD = Route(1, "layer 2", 0.55, 0.05, "exit-head")


def test_width_grows_with_the_queue_and_is_as_narrow_as_the_load_allows() -> None:
    routes = useful_routes([FOUR, TWO])
    widest = [choose_routes(waiting, routes, 4)[-1].width for waiting in (1, 4, 5, 6, 8, 500)]
    assert widest == [1, 1, 2, 4, 4, 4]


def test_an_exit_head_is_used_between_the_plain_model_and_cheaper_groups() -> None:
    routes = useful_routes([FOUR, TWO, HEAD])
    assert routes == [PLAIN, HEAD, FOUR]  # a pair costs more per input than the head
    chosen = [choose_routes(waiting, routes, 4)[-1] for waiting in (1, 4, 5, 6, 7, 500)]
    assert chosen == [PLAIN, PLAIN, HEAD, HEAD, FOUR, FOUR]
    assert useful_routes([HEAD]) == [PLAIN, HEAD]


def test_an_exit_head_answers_left_over_inputs_except_those_that_require_the_plain_model() -> None:
    groups = form_groups([9] * 7, [None, 1, None, None, 2, None, None], [PLAIN, HEAD, FOUR])
    found = {index: group.route for group in groups for index in group.members}
    assert found[1] == PLAIN
    assert found[4] == HEAD  # at most two may share, and there is no adapter for two
    assert [found[index] for index in (0, 2, 3, 5, 6)].count(FOUR) == 4
    assert [found[index] for index in (0, 2, 3, 5, 6)].count(HEAD) == 1
    forward = next_pass([9] * 3, [None, 1, None], 3, [PLAIN, HEAD], plain_load=0, max_tokens=1000)
    assert [(group.route, group.members) for group in forward.groups] == [(HEAD, (0,)), (HEAD, (2,))]


def test_a_width_that_saves_nothing_is_never_used() -> None:
    assert useful_routes([TWO, Route(4, "layer 3", 0.7, 0.2)]) == [PLAIN, TWO]


def test_two_adapters_of_one_width_are_refused() -> None:
    with pytest.raises(UserError, match="two adapters serve N = 2"):
        useful_routes([TWO, TWO])
    with pytest.raises(UserError, match="two adapters serve N = 1"):
        useful_routes([HEAD, HEAD])


def test_an_adapter_no_cheaper_than_the_plain_model_is_never_used() -> None:
    assert useful_routes([Route(1, "layer 0", 0.0, 1.0, "siso")]) == [PLAIN]


def test_groups_contain_every_input_once_with_inputs_of_similar_length() -> None:
    lengths = [5, 60, 6, 50, 7, 55, 8, 58]
    groups = form_groups(lengths, [None] * 8, [PLAIN, TWO, FOUR])
    assert [set(group.members) for group in groups] == [{1, 3, 5, 7}, {0, 2, 4, 6}]


def test_an_input_never_shares_a_wider_group_than_it_allows() -> None:
    caps = [1, 4, 2, 4, 3, 4, 4, 1]
    groups = form_groups([9] * 8, caps, [PLAIN, TWO, FOUR])
    assert sorted(index for group in groups for index in group.members) == list(range(8))
    assert all(group.width <= caps[index] for group in groups for index in group.members)
    assert sorted(group.width for group in groups) == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("inputs", "shared", "expected"),
    [
        (3, 1.4, [(4, 3)]),  # 0.1 · 3 + 1.4 = 1.7, less than a pair and a single (1.4 + 1) or three alone
        (2, 1.4, [(2, 2)]),  # a pair costs 1.4, a group filled up 1.6
        (1, 1.4, [(1, 1)]),  # alone 1, a group filled up 1.5
        (1, 0.8, [(4, 1)]),  # alone 1, a group filled up 0.9
        (7, 1.4, [(4, 4), (4, 3)]),
    ],
)
def test_left_over_inputs_fill_a_group_or_use_a_narrower_width_whichever_is_cheaper(
    inputs: int, shared: float, expected: list[tuple[int, int]]
) -> None:
    groups = form_groups([9] * inputs, [4] * inputs, [PLAIN, TWO, Route(4, "layer 1", 0.1, shared)])
    assert [(group.width, len(group.members)) for group in groups] == expected


def test_passes_share_a_prefill_limit_their_tokens_and_do_not_pad_short_texts_to_long_ones() -> None:
    groups = [Group(PLAIN, (4,)), Group(TWO, (0, 1)), Group(TWO, (2, 3)), Group(FOUR, (5, 6, 7, 8))]
    lengths = [30, 30, 10, 9, 8, 29, 28, 27, 26]
    found = [
        (forward.stem, [group.members for group in forward.groups]) for forward in form_passes(groups, lengths, 1000)
    ]
    assert found == [("plain", [(4,)]), ("layer 1", [(0, 1), (5, 6, 7, 8)]), ("layer 1", [(2, 3)])]
    assert len(form_passes(groups, lengths, 6 * 30)) == 3
    assert len(form_passes(groups, lengths, 6 * 30 - 1)) == 4


def test_the_next_pass_is_chosen_by_order_regardless_of_its_length() -> None:
    lengths = [4, 60, 61, 62, 63, 5]
    forward = next_pass(lengths, [4] * 6, 6, [PLAIN, TWO, FOUR], plain_load=0, max_tokens=1000)
    assert [group.members for group in forward.groups] == [(5, 0)]
    assert {group.width for group in forward.groups} == {4}  # a pair fills it twice: 2 · 0.4 + 0.4 < 2 · 0.4 + 0.6
    alone = next_pass(lengths, [1, 4, 4, 4, 4, 4], 6, [PLAIN, TWO, FOUR], plain_load=0, max_tokens=1000)
    assert [group.members for group in alone.groups] == [(0,)]


class Simulation:
    """Evenly spaced arrivals and a model that needs one second per plain input, on a simulated clock."""

    def __init__(self, max_queue: int = 100) -> None:
        self.now = 0.0
        self.queue = PullQueue(max_queue, Metrics(), clock=lambda: self.now)
        self.widths: list[int] = []
        self.waits: list[float] = []
        self.rejected = 0

    def run(self, rate: float, inputs: int) -> Simulation:
        arrivals = [self.now + index / rate for index in range(inputs)]
        while arrivals or len(self.queue):
            while arrivals and arrivals[0] <= self.now:
                self.arrive(arrivals.pop(0))
            if len(self.queue):
                self.serve()
            else:
                self.now = arrivals[0]
        return self

    def arrive(self, at: float) -> None:
        now, self.now = self.now, at  # the input arrived during a pass
        try:
            with self.queue.room(TASK, 1):
                self.queue.put([Ticket(TASK, {"input_ids": [0] * 9})])
        except Overloaded:
            self.rejected += 1
        self.now = now

    def serve(self) -> None:
        window = self.queue.window(32)
        assert window is not None
        count = len(window.tickets)
        forward = next_pass([9] * count, [4] * count, window.waiting, [PLAIN, TWO, FOUR], 4.0, 10_000)
        rows = self.queue.claim([window.tickets[place] for group in forward.groups for place in group.members])
        self.waits += [self.now - ticket.queued for ticket in rows]
        for group in forward.groups:
            self.widths += [group.width] * len(group.members)
            self.now += group.route.group_cost(len(group.members))


class Named:
    name = "task"


TASK = Named()


def test_under_light_load_every_input_runs_alone_at_once() -> None:
    quiet = Simulation().run(rate=0.5, inputs=200)
    assert set(quiet.widths) == {1}
    assert max(quiet.waits) == 0


@pytest.mark.parametrize(("rate", "least", "most"), [(1.3, 1.1, 3.0), (1.9, 3.0, 4.0)])
def test_groups_are_as_wide_as_the_load_requires(rate: float, least: float, most: float) -> None:
    """Alone the model handles one input per second, in groups of four two: between these rates waits stay short."""
    loaded = Simulation().run(rate, inputs=2000)
    assert loaded.rejected == 0
    assert len(loaded.widths) == 2000
    assert least < sum(loaded.widths) / 2000 < most
    assert max(loaded.waits) < 40


def test_overload_is_refused_and_leaves_no_backlog() -> None:
    flooded = Simulation().run(rate=6, inputs=3000)
    assert flooded.rejected > 1500
    assert flooded.widths.count(4) > 0.95 * len(flooded.widths)
    assert max(flooded.waits) < 100 / 2 + 32  # a full queue at two inputs per second, plus the previous pass
    flooded.widths.clear()
    flooded.waits.clear()
    flooded.run(rate=0.5, inputs=100)
    assert set(flooded.widths) == {1}
    assert max(flooded.waits) == 0
