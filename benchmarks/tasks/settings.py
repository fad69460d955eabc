"""Settings of the benchmark of many tasks."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from revmux.errors import UserError
from revmux.pretrained.config import EMBEDDED_NAME

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        base: the model that all adapters change: a name or a folder.
        tasks: number of loaded tasks.
        cold: number of tasks that are loaded afterwards, each in the place of another one.
        rank: rank of LoRA.
        frozen_layers: number of layers that no adapter changes.
        together: tasks of a request that names several.
        rounds: rounds, each with one leg per side of a ratio.
        requests: requests per leg.
        clients: clients that send requests at the same time.
        tokens: tokens per text.
        threads: CPU threads of the model.

    Raises:
        UserError: a number is too small.
    """

    base: str = EMBEDDED_NAME
    tasks: int = 1000
    cold: int = 50
    rank: int = 16
    frozen_layers: int = 4
    together: int = 6
    rounds: int = 5
    requests: int = 600
    clients: int = 32
    tokens: int = 32
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        for name in ("cold", "rank", "rounds", "requests", "clients", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if not 2 <= self.together <= self.tasks:
            raise UserError(
                f"together is {self.together} and tasks is {self.tasks}; choose at least 2 tasks together, and as many tasks"
            )

    def about(self) -> dict[str, Any]:
        """Return the settings that figures depend on; a kept stage is reused only if they are equal."""
        return asdict(self)
