"""The limits that an operator sets."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.adapters.config import MERGE_LIMIT
from revmux.errors import UserError

WIDEST = 2**31 - 1
"""The highest limit of a group's width, which stands for any width."""
HIGHEST_PRIORITY = 10
"""Priorities range from minus to plus this value. The limit ensures that no request can delay others forever."""


@dataclass(frozen=True)
class Limits:
    """Limits on waiting and running inputs.

    Args:
        max_multiplex: maximum width of a group. Wider adapters are not used; 1 disables all adapters. None sets no
            limit.
        max_queue: maximum number of waiting inputs per task.
        max_batch: maximum number of inputs per forward pass.
        max_batch_tokens: maximum number of tokens per forward pass, including padding.
        plain_load: the plain model answers all inputs while the waiting inputs cost no more than this many plain
            inputs. Above, inputs use an exit head or the narrowest groups that reduce the cost below this limit, or
            else the widest groups that are allowed.
        share_plain: whether inputs of the plain model share a prefill with different texts of other tasks. Their answers then
            differ from the plain model's by rounding.
        priority_seconds: value of one point of priority: seconds of waiting time within a task, and seconds of device
            time between tasks.
        audit: share of the inputs that adapters answered to run through the plain model too, to measure how often the labels
            agree.
        merge_limit: most bytes of memory of an adapter's copy of the weights into which LoRA's updates are merged; 0 keeps
            them apart.

    Raises:
        UserError: a limit is below 1, ``plain_load`` or ``merge_limit`` is negative, ``priority_seconds`` is not above 0, or ``audit`` is
            outside 0..1.
    """

    max_multiplex: int | None = None
    max_queue: int = 512
    max_batch: int = 128
    max_batch_tokens: int = 16384
    plain_load: float = 4.0
    priority_seconds: float = 1.0
    audit: float = 0.0
    merge_limit: int = MERGE_LIMIT
    share_plain: bool = False

    def __post_init__(self) -> None:
        for name in ("max_multiplex", "max_queue", "max_batch", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more")
        if self.plain_load < 0:
            raise UserError(f"plain_load is {self.plain_load}; choose 0 (group whenever it is cheaper) or more")
        if self.merge_limit < 0:
            raise UserError(f"merge_limit is {self.merge_limit}; choose 0 (LoRA stays unmerged) or more bytes")
        if not self.priority_seconds > 0:
            raise UserError(f"priority_seconds is {self.priority_seconds}; choose a value above 0, such as 1")
        if not 0 <= self.audit <= 1:
            raise UserError(f"audit is {self.audit}; choose a share in 0..1, such as 0.01")
