"""The front of accuracy against cost (Pareto front): the systems that no other system beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from revmux.methods import Method, method_class


class Scored(Protocol):
    """Anything that can be on a front: it has a name, an accuracy and a cost."""

    @property
    def name(self) -> str: ...

    @property
    def accuracy(self) -> float: ...

    @property
    def cost(self) -> float: ...


Item = TypeVar("Item", bound=Scored)
LADDER = "ladder"
"""Group of the rows of ladders in plots."""


@dataclass(frozen=True)
class FrontRow:
    """One system in tables, plots and result files.

    Attributes:
        name: unique in its comparison, such as ``revmux-n2-l3-1f0a``.
        method: registered name of the method.
        num_inputs: N.
        prefill_layers: l; for an exit head, the layer that it reads.
        infonce_weight: λ; NaN if it was not trained with InfoNCE.
        accuracy: accuracy on the split of the comparison, 0..1.
        siso_accuracy: accuracy of the plain model on the same inputs.
        cost_counted: operations per input relative to SISO.
        throughput_ratio: measured inputs per second relative to SISO; None if not measured.
        threshold: confidence below which an answer falls back; None without fallback.
        fallback: share of answers that fell back.
        on_front: whether no other row beats it.
        accuracy_std: standard deviation of the accuracy over shuffles, 0..1; 0 if unknown.
        later: short names of the later stages of a ladder, in their order.
        test_accuracy: accuracy on the test split, which is reported and chooses nothing; NaN if it is not known.
    """

    name: str
    method: str
    num_inputs: int
    prefill_layers: int
    infonce_weight: float
    accuracy: float
    siso_accuracy: float
    cost_counted: float
    throughput_ratio: float | None = None
    threshold: float | None = None
    fallback: float = 0.0
    on_front: bool = False
    accuracy_std: float = 0.0
    test_accuracy: float = math.nan
    later: tuple[str, ...] = ()

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return method_class(self.method)

    @property
    def cost(self) -> float:
        """Cost per input relative to SISO: the measured one if there is one, else the counted one."""
        return cost_of(self.cost_counted, self.throughput_ratio)

    @property
    def group(self) -> str:
        """What the row is drawn as: its method, or a ladder."""
        return LADDER if self.later else self.method


def cost_of(counted: float, throughput_ratio: float | None) -> float:
    """Cost per input relative to SISO: the inverse of the measured throughput ratio, or the counted cost without one."""
    return counted if throughput_ratio is None else 1 / throughput_ratio


def front(items: Sequence[Item]) -> list[Item]:
    """The items that no other item beats, cheapest first.

    One item beats another if it is no dearer and no less accurate, and better in one of the two. Of items that are
    equal in both, only the one whose name sorts first is kept. The order of ``items`` does not matter.
    """
    kept: list[Item] = []
    for item in sorted(items, key=lambda item: (item.cost, -item.accuracy, item.name)):
        if not kept or item.accuracy > kept[-1].accuracy:
            kept.append(item)
    return kept


def mark_front(rows: Sequence[FrontRow]) -> list[FrontRow]:
    """The rows in the same order, with ``on_front`` set."""
    best = {row.name for row in front(rows)}
    return [replace(row, on_front=row.name in best) for row in rows]
