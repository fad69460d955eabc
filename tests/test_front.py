"""The front of accuracy against cost."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revmux.plan.front import FrontRow, cost_of, front, mark_front


@dataclass(frozen=True)
class Item:
    name: str
    accuracy: float
    cost: float


def beats(one: Item, other: Item) -> bool:
    better = one.accuracy > other.accuracy or one.cost < other.cost
    return one.accuracy >= other.accuracy and one.cost <= other.cost and better


# Few distinct values, so that ties are common.
items = st.lists(
    st.builds(Item, st.just(""), st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.sampled_from([0.2, 0.4, 0.6, 1.0])),
    max_size=12,
).map(lambda drawn: [Item(f"item{index:02d}", item.accuracy, item.cost) for index, item in enumerate(drawn)])


@settings(max_examples=200, deadline=None)
@given(items, st.randoms())
def test_the_front_is_the_undominated_rows_in_any_order(given_items: list[Item], chance: random.Random) -> None:
    unbeaten = [one for one in given_items if not any(beats(other, one) for other in given_items)]
    first_of_equals = {
        (one.cost, one.accuracy): min(
            (other for other in unbeaten if (other.cost, other.accuracy) == (one.cost, one.accuracy)),
            key=lambda other: other.name,
        )
        for one in unbeaten
    }
    expected = [first_of_equals[key] for key in sorted(first_of_equals)]
    shuffled = list(given_items)
    chance.shuffle(shuffled)
    assert front(given_items) == front(shuffled) == expected


def test_measured_cost_takes_precedence_over_counted_cost() -> None:
    assert cost_of(0.5, None) == 0.5
    assert cost_of(0.5, 1.25) == pytest.approx(0.8)
    slow = FrontRow("slow", "revmux", 2, 1, 0.25, 0.7, 0.8, cost_counted=0.6, throughput_ratio=1.1)
    fast = FrontRow("fast", "token-split", 2, 1, 0.25, 0.7, 0.8, cost_counted=0.7, throughput_ratio=1.4)
    assert [row.on_front for row in mark_front([slow, fast])] == [False, True]
