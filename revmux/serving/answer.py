"""What a request is told, and scores as labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from revmux.methods import Siso


@dataclass(frozen=True)
class Answer:
    """The model's answer to one input.

    Attributes:
        scores: (C,) float32 on the CPU, before softmax.
        width: N of the group that it rode in; 1 is the plain model or an exit head.
        queue_seconds: from being queued to the start of its forward pass.
        inference_seconds: its forward pass, from padding to scores on the CPU.
        truncated: whether the text was cut to the task's ``max_length``.
        fell_back: whether the group's answer was less sure than the threshold, so that the input resumed alone and
            ``scores`` are the plain model's.
        method: that it rode with; ``siso`` is the plain model.
        tokenize_seconds: from text to tokens.
        tokens: that the input had.
        group: a number that the inputs of one group share, and no others of the engine.
    """

    scores: Tensor
    width: int
    queue_seconds: float
    inference_seconds: float
    truncated: bool = False
    fell_back: bool = False
    method: str = Siso.name
    tokenize_seconds: float = 0.0
    tokens: int = 0
    group: int = 0
