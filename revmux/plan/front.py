"""The front of accuracy against cost: the systems that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from revmux.methods import Method, method_class


class Scored(Protocol):
    """Anything with a name, an accuracy and a cost can stand on a front."""

    @property
    def name(self) -> str: ...

    @property
    def accuracy(self) -> float: ...

    @property
    def cost(self) -> float: ...


Item = TypeVar("Item", bound=Scored)


@dataclass(frozen=True)
class FrontRow:
    """One system in tables, plots and result files.

    Attributes:
        name: unique in its comparison, such as ``revmux-n2-l3-1f0a``.
        method: registered name of the method.
        num_inputs: N.
        prefill_layers: l; of an exit head the layer that it leaves at.
        infonce_weight: λ; NaN where none was trained with.
        accuracy: on the split that the comparison is made on, 0..1.
        siso_accuracy: the plain model's on the same inputs.
        cost_counted: operations an input relative to SISO.
        throughput_ratio: inputs a second relative to SISO, measured; None where it was not.
        threshold: confidence below which an answer resumes alone; None without fall-back.
        fallback: share of answers that resumed alone.
        on_front: whether no other row beats it.
        accuracy_std: spread of the accuracy over shuffles, 0..1; 0 where it is not known.
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

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return method_class(self.method)

    @property
    def cost(self) -> float:
        """Cost an input relative to SISO: measured where it was, else counted."""
        return cost_of(self.cost_counted, self.throughput_ratio)


def cost_of(counted: float, throughput_ratio: float | None) -> float:
    """What an input costs relative to SISO: as measured on this hardware, or as counted where nothing was measured."""
    return counted if throughput_ratio is None else 1 / throughput_ratio


def front(items: Sequence[Item]) -> list[Item]:
    """The items that no other beats, cheapest first.

    One item beats another if it is no dearer and no less accurate, and better in one of the two. Of items that are
    equal in both, the one whose name sorts first stands for all; the order of ``items`` does not matter.
    """
    kept: list[Item] = []
    for item in sorted(items, key=lambda item: (item.cost, -item.accuracy, item.name)):
        if not kept or item.accuracy > kept[-1].accuracy:
            kept.append(item)
    return kept


def mark_front(rows: Sequence[FrontRow]) -> list[FrontRow]:
    """The rows in their order, each with whether it is on the front."""
    best = {row.name for row in front(rows)}
    return [replace(row, on_front=row.name in best) for row in rows]
