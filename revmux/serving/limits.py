"""The bounds that an operator sets."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.errors import UserError

HIGHEST_PRIORITY = 10
"""Priorities go from minus this to plus this; bounded, so that no request can put off the others for good."""


@dataclass(frozen=True)
class Limits:
    """What an engine may take at once.

    Args:
        max_multiplex: widest group; wider adapters stay unused, at 1 all of them. None: as wide as the adapters are.
        max_queue: inputs of one task that may wait.
        max_batch: inputs of a forward pass.
        max_batch_tokens: tokens of a forward pass, padding included.
        plain_load: when what waits costs no more than this many plain inputs, the plain model answers every input;
            beyond, an exit head does, or groups as narrow as brings the cost back below, else as wide as allowed.
        priority_seconds: what a point of priority is worth: so many seconds of waiting within a task, and of the
            device's time between tasks.

    Raises:
        UserError: a bound below 1, a negative ``plain_load``, or ``priority_seconds`` that is not above 0.
    """

    max_multiplex: int | None = None
    max_queue: int = 512
    max_batch: int = 128
    max_batch_tokens: int = 16384
    plain_load: float = 4.0
    priority_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_multiplex", "max_queue", "max_batch", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more")
        if self.plain_load < 0:
            raise UserError(f"plain_load is {self.plain_load}; choose 0 (group whenever it is cheaper) or more")
        if not self.priority_seconds > 0:
            raise UserError(f"priority_seconds is {self.priority_seconds}; choose more than 0, such as 1")
