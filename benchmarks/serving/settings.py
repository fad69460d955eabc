"""How large the benchmark is."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from revmux.errors import UserError

Row = dict[str, Any]
WIDTHS, CUTS = (2, 4, 8), (1, 3)


@dataclass(frozen=True)
class Shape:
    """A BERT by its shape; by default BERT-base.

    Args:
        hidden_size: d.
        num_hidden_layers: L.
        num_attention_heads: heads.
        intermediate_size: width within a layer.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072

    @property
    def name(self) -> str:
        """In the rows."""
        if self == Shape():
            return "BERT-base shape"
        return f"BERT, {self.num_hidden_layers} layers, d = {self.hidden_size}"


@dataclass(frozen=True)
class Sizes:
    """Requests a leg, one input each, and inputs a pass; a pair is two legs.

    Attributes:
        max_batch: inputs of a forward pass, the same for every server.
        alone: inputs of a timing without a server.
        plain: requests of a leg at N = 1, to be compared with groups.
        grouped: requests of a leg in groups.
        rivals: requests of a leg of two servers at N = 1.
        quiet: requests of a client that is alone.
        half: arrivals at half of the capacity.
    """

    max_batch: int
    alone: int
    plain: int
    grouped: int
    rivals: int
    quiet: int
    half: int

    def times(self, scale: float) -> Sizes:
        """Longer or shorter legs, still of whole passes, so that none ends with groups that are not full."""

        def whole(inputs: int, unit: int) -> int:
            return unit * max(1, round(inputs * scale / unit))

        return Sizes(
            max_batch=self.max_batch,
            alone=whole(self.alone, max(WIDTHS)),
            plain=whole(self.plain, self.max_batch),
            grouped=whole(self.grouped, self.max_batch),
            rivals=whole(self.rivals, self.max_batch),
            quiet=max(3, round(self.quiet * scale)),
            half=max(3, round(self.half * scale)),
        )

    @property
    def connections(self) -> int:
        """Of a closed loop: while one pass runs, another one waits."""
        return 2 * self.max_batch


@dataclass(frozen=True)
class Settings:
    """The benchmark.

    Args:
        shape: of the backbone with random weights, whose inputs all have 128 tokens.
        pairs: of each ratio.
        scale: multiplies the requests of every leg.
        threads: of each server's model; by default a core is left to HTTP and to the load.
        glue: folder with SST-2, whose dev sentences the embedded encoder reads; without it those of the embedded task.
        infinity: the executable ``infinity_emb`` of an environment of its own.

    Raises:
        UserError: a number that is too small, or a folder or file that is not there.
    """

    shape: Shape = field(default_factory=Shape)
    pairs: int = 3
    scale: float = 1.0
    threads: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) - 1))
    glue: Path | None = None
    infinity: Path | None = None

    def __post_init__(self) -> None:
        for name in ("pairs", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if self.scale <= 0:
            raise UserError(f"scale is {self.scale}; choose more than 0, such as 1")
        if self.glue is not None and not (self.glue / "SST-2").is_dir():
            raise UserError(f"glue is {str(self.glue)!r}, which has no folder SST-2; name the folder that holds it")
        if self.infinity is not None and not self.infinity.is_file():
            raise UserError(f"infinity is {str(self.infinity)!r}, no file; name ENVIRONMENT/bin/infinity_emb")

    def about(self) -> dict[str, Any]:
        """What figures depend on, of which a kept stage must have the same."""
        return {name: value for name, value in asdict(self).items() if name not in ("glue", "infinity")}
