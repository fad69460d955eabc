"""SISO, single input single output: the plain model, as the method with N = 1."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from revmux.backbone import HiddenState
from revmux.methods.base import Method
from revmux.methods.registry import register_method


@register_method
class Siso(Method):
    """Every input alone through all layers; nothing to train."""

    name: ClassVar[str] = "siso"
    fixed_num_inputs: ClassVar[int | None] = 1

    def multiplex(self, states: HiddenState) -> HiddenState:
        return states.map(lambda tensor: tensor[:, 0])

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return answers
