"""SISO, single input single output: the plain model, as the method with N = 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from revmux.backbone import HiddenState
from revmux.methods.base import BackboneShape, Method
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class SisoOptions:
    """Settings of SISO.

    Args:
        tune_backbone: train the layers above ``prefill_layers`` and the head: how a task model is made.
    """

    tune_backbone: bool = False


@register_method
class Siso(Method):
    """Every input alone through all layers; no adapters."""

    name: ClassVar[str] = "siso"
    Options: ClassVar[type] = SisoOptions
    fixed_num_inputs: ClassVar[int | None] = 1

    def __init__(self, shape: BackboneShape, num_inputs: int = 1, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        self.tunes_backbone = self.options.tune_backbone

    @property
    def tunes_prefill(self) -> bool:
        return False

    def multiplex(self, states: HiddenState) -> HiddenState:
        return states.map(lambda tensor: tensor[:, 0])

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return answers
