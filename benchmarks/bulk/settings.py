"""Settings of the bulk benchmark."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.settings import Shape
from revmux.errors import UserError

Row = dict[str, Any]
WIDTHS, CUT, LENGTH = (4, 8), 1, 128
BATCH = 64
"""Inputs per batch of the other programs."""


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        shape: shape of the second backbone, which has random weights.
        pairs: rounds, each with one leg per program.
        group_pairs: rounds, each with one leg per width and one for the ladder.
        scale: factor for the rows of every leg.
        group_scale: further factor for the rows of the legs in groups, so that a short leg is long compared with its start.
        threads: CPU threads of every model.
        memory_rows: rows of the small and of the large file whose peak memory is compared.
        large_pairs: rounds in which the job and the function classify the large file.
        infinity: a Python whose environment has infinity-emb; without it, Infinity is not measured.

    Raises:
        UserError: a number is too small, or the file does not exist.
    """

    shape: Shape = field(default_factory=Shape)
    pairs: int = 3
    group_pairs: int = 3
    scale: float = 1.0
    group_scale: float = 4.0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    memory_rows: tuple[int, int] = (10_000, 1_000_000)
    large_pairs: int = 2
    infinity: Path | None = None

    def __post_init__(self) -> None:
        for name in ("pairs", "group_pairs", "large_pairs", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
        for name in ("scale", "group_scale"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose more than 0, such as 1")
        if self.infinity is not None and not self.infinity.is_file():
            raise UserError(f"infinity is {str(self.infinity)!r}, which is not a file; name ENVIRONMENT/bin/python")

    def about(self, *names: str) -> dict[str, Any]:
        """Return these settings, or all that figures depend on; a kept stage is reused only if its own are equal."""
        values = {name: value for name, value in asdict(self).items() if name != "infinity"}
        return {name: values[name] for name in names} if names else values
