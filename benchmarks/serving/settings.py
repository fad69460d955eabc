"""Settings of the serving benchmark."""

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
    """The shape of a BERT; by default BERT-base.

    Args:
        hidden_size: hidden size d.
        num_hidden_layers: number of layers L.
        num_attention_heads: attention heads per layer.
        intermediate_size: inner size of the feed-forward part.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072

    @property
    def name(self) -> str:
        """Name in the rows."""
        if self == Shape():
            return "BERT-base shape"
        return f"BERT, {self.num_hidden_layers} layers, d = {self.hidden_size}"


@dataclass(frozen=True)
class Sizes:
    """Requests per leg, with one input each, and inputs per pass; a pair is two legs.

    Attributes:
        max_batch: maximum number of inputs per forward pass, the same for every server.
        alone: inputs per timing without a server.
        plain: requests per leg at N = 1, compared with groups.
        grouped: requests per leg in groups.
        rivals: requests per leg when two servers are compared at N = 1.
        quiet: requests of a single client without other load.
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
        """Return longer or shorter legs, still of whole passes, so that all groups are full."""

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
        """Connections of a closed loop: while one pass runs, the inputs of the next one wait."""
        return 2 * self.max_batch


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        shape: shape of the backbone with random weights, whose inputs all have 128 tokens.
        pairs: pairs of runs per ratio.
        scale: factor for the requests of every leg.
        threads: CPU threads per server's model; by default one core is left for HTTP and the load.
        glue: folder that contains SST-2, whose dev sentences the embedded encoder classifies; default: the embedded task.
        infinity: path of the executable ``infinity_emb`` in its own environment; without it, Infinity is not measured.

    Raises:
        UserError: a number is too small, or a folder or file does not exist.
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
            raise UserError(f"glue is {str(self.glue)!r}, which has no folder SST-2; name the folder that contains it")
        if self.infinity is not None and not self.infinity.is_file():
            raise UserError(
                f"infinity is {str(self.infinity)!r}, which is not a file; name ENVIRONMENT/bin/infinity_emb"
            )

    def about(self) -> dict[str, Any]:
        """Return the settings that figures depend on; a kept stage is reused only if they are equal."""
        return {name: value for name, value in asdict(self).items() if name not in ("glue", "infinity")}
