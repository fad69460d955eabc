"""What is run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from revmux.pretrained.config import EMBEDDED_NAME

TRAINED = "llama-3-8b"
WHY = "no GPU on the machine that wrote this file"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        inputs: inputs per pass of each shape: a preset of ``revmux memory``, an embedded model or a folder.
        length: tokens per input.
        side: rows and columns of the matrices whose product measures the peak rate.
        pairs: paired timings per system.
        batch: inputs per training step.
        steps: training steps.
        dtype: type of the frozen weights.
    """

    inputs: dict[str, int]
    length: int = 128
    side: int = 8192
    pairs: int = 5
    batch: int = 32
    steps: int = 10
    dtype: torch.dtype = torch.bfloat16


SIZES = Sizes({EMBEDDED_NAME: 1024, "bert-base": 512, TRAINED: 64})


def named(shape: str, title: str) -> Row:
    """The columns that name a row."""
    return {"name": f"{shape}: {title}", "backbone": shape, "title": title}
