"""Settings of a plan: the goal, the choosing set, and how candidates are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from revmux.errors import UserError


@dataclass(frozen=True)
class MeasureConfig:
    """How systems are measured on this hardware.

    Args:
        shuffles: Number of groupings to average each accuracy over. At least 1.
        thresholds: Thresholds (confidences from 0 to 1) to consider for every adapter, in addition to no threshold.
            Default: chosen from the confidences of each adapter.
        max_stages: Maximum number of adapters in a ladder. 1 considers only single adapters, with and without fallback.
            At least 1.
        throughput_inputs: Inputs per timing. 0 skips the timings and ranks by counted cost.
        throughput_batch: Inputs per forward pass of a timing. At least 1.
        throughput_pairs: Number of timings of SISO and of each system, which alternate. At least 1.
        search_share: Share of the choosing set on which the front is found, together with the selection set. The front
            is tested on the rest. Above 0 and below 1.
        seed: Random seed of the groupings and of the division of the choosing set.
        price: Hourly price of this hardware, in any currency. The page of the plan then shows the price of a million
            answers. Above 0. Default: no prices.
    """

    shuffles: int = 5
    thresholds: tuple[float, ...] | None = None
    max_stages: int = 3
    throughput_inputs: int = 256
    throughput_batch: int = 64
    throughput_pairs: int = 5
    search_share: float = 0.2
    seed: int = 0
    price: float | None = None

    def __post_init__(self) -> None:
        if self.price is not None and not self.price > 0:
            raise UserError(f"price is {self.price}; choose more than 0, such as 2.5 per hour")
        for name in ("shuffles", "max_stages", "throughput_batch", "throughput_pairs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if not 0 < self.search_share < 1:
            raise UserError(f"search_share is {self.search_share}; choose a share between 0 and 1, such as 0.2")
        if self.throughput_inputs < 0:
            raise UserError(f"throughput_inputs is {self.throughput_inputs}; choose 0 (count only) or more")
        if self.thresholds is not None and any(not 0 <= threshold <= 1 for threshold in self.thresholds):
            raise UserError(f"thresholds are {list(self.thresholds)}; choose confidences in 0..1")


@dataclass(frozen=True)
class SplitConfig:
    """The choosing set: a slice of the train split that is held back from training, to compare the systems on it.

    The front of all systems is found on a part of it, see :class:`MeasureConfig`, and tested on the rest.

    Args:
        share: Share of the train split to hold back. Above 0 and below 1.
        limit: Maximum number of inputs. At least 4. A larger set can confirm a smaller allowance.
    """

    share: float = 0.2
    limit: int = 8000

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share is {self.share}; choose a share of the train split between 0 and 1, such as 0.2")
        if self.limit < 4:
            raise UserError(f"limit is {self.limit}; choose 4 inputs or more, such as 8000")


@dataclass(frozen=True)
class Goal:
    """The allowed loss of accuracy, or the required throughput. At least one of the two must be set.

    Args:
        allowance: Loss of accuracy against SISO that is allowed, in percentage points from 0 to 100. Default: no limit.
        throughput: Required inputs per second, as a multiple of SISO's throughput. Above 0. Default: no requirement.
        confidence: Confidence with which the loss must stay within the allowance. Above 0.5 and below 1.
    """

    allowance: float | None = None
    throughput: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.allowance is None and self.throughput is None:
            raise UserError(
                "neither allowance nor throughput is set; set at least one, such as --goal.allowance 1.0 (points)"
            )
        if self.allowance is not None and not 0 <= self.allowance <= 100:
            raise UserError(f"allowance is {self.allowance}; choose the points of accuracy that may be lost, 0 to 100")
        if self.throughput is not None and not (self.throughput > 0 and math.isfinite(self.throughput)):
            raise UserError(f"throughput is {self.throughput}; choose a multiple of SISO's above 0, such as 1.5")
        if not 0.5 < self.confidence < 1:
            raise UserError(f"confidence is {self.confidence}; choose a level between 0.5 and 1, such as 0.95")
