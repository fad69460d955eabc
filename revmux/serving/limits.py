"""The bounds that an operator sets."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What an engine may take at once.

    Args:
        max_multiplex: widest group; wider adapters stay unused. None: as wide as the adapters are.
        max_queue: inputs that may wait.
        max_batch: inputs that the model takes from the queue at once.
        max_batch_tokens: tokens that it takes at once, padding of a forward pass included.
        plain_load: when what waits costs no more than this many plain inputs, every input runs alone;
            beyond, groups are as narrow as brings the cost back below, else as wide as allowed.

    Raises:
        UserError: a bound below 1, or a negative ``plain_load``.
    """

    max_multiplex: int | None = None
    max_queue: int = 512
    max_batch: int = 128
    max_batch_tokens: int = 16384
    plain_load: float = 4.0

    def __post_init__(self) -> None:
        for name in ("max_multiplex", "max_queue", "max_batch", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more")
        if self.plain_load < 0:
            raise UserError(f"plain_load is {self.plain_load}; choose 0 (group whenever it is cheaper) or more")
