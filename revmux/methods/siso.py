"""SISO (single input, single output): the plain model as a method with N = 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.backbone.peft_lora import add_peft_lora
from revmux.errors import UserError
from revmux.methods.base import BackboneShape, Method
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class SisoOptions:
    """Settings of SISO.

    Args:
        tune_backbone: whether to train the layers above ``prefill_layers`` and the head. This creates a task model.
        soft_prompt: number of trained vectors that precede each input, with the model itself frozen. 0 means none.
        peft_rank: rank of PEFT's LoRA in the layers above ``prefill_layers``, which is trained with the head while the
            model itself stays frozen. 0 means none.
    """

    tune_backbone: bool = False
    soft_prompt: int = 0
    peft_rank: int = 0


@register_method
class Siso(Method):
    """Each input runs alone through all layers, without adapters."""

    name: ClassVar[str] = "siso"
    title: ClassVar[str] = "SISO (the plain model)"
    marks: ClassVar[tuple[str, str]] = ("*", "star")
    is_plain: ClassVar[bool] = True
    Options: ClassVar[type] = SisoOptions
    fixed_num_inputs: ClassVar[int | None] = 1

    def __init__(self, shape: BackboneShape, num_inputs: int = 1, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        if self.options.soft_prompt < 0:
            raise UserError(
                f"siso: soft_prompt is {self.options.soft_prompt}; choose 0 (none) or more vectors, such as 20"
            )
        if self.options.peft_rank < 0:
            raise UserError(f"siso: peft_rank is {self.options.peft_rank}; choose 0 (none) or more, such as 16")
        chosen = [name for name in ("tune_backbone", "soft_prompt", "peft_rank") if getattr(self.options, name)]
        if len(chosen) > 1:
            raise UserError(f"siso: {' and '.join(chosen)} are set, which tune different weights; set one of them")
        self.tunes_backbone = bool(chosen)

    @classmethod
    def point_name(cls, num_inputs: int, prefill_layers: int) -> str:
        return "SISO"

    @classmethod
    def system_name(cls, num_inputs: int, prefill_layers: int) -> str:
        return cls.title

    @classmethod
    def describe(cls, num_inputs: int, prefill_layers: int) -> str:
        return "the plain model (SISO)"

    @property
    def tunes_prefill(self) -> bool:
        return False

    def check_prefill(self, prefill_layers: int) -> None:
        super().check_prefill(prefill_layers)
        if self.options.soft_prompt and prefill_layers:
            raise UserError(
                f"siso: prefill_layers is {prefill_layers}, but a soft prompt is trained through all layers; choose 0"
            )
        if self.options.peft_rank and prefill_layers >= self.shape.num_layers:
            raise UserError(
                f"siso: prefill_layers is {prefill_layers}, so that LoRA has no layer of {self.shape.num_layers}; choose "
                "fewer, or peft_rank 0"
            )

    def unfreeze(self, backbone: Backbone, prefill_layers: int) -> None:
        if self.options.soft_prompt:
            backbone.add_soft_prompt(self.options.soft_prompt)
        elif self.options.peft_rank:
            add_peft_lora(backbone, prefill_layers, self.options.peft_rank)
        else:
            super().unfreeze(backbone, prefill_layers)

    def multiplex(self, states: HiddenState) -> HiddenState:
        return states.map(lambda tensor: tensor[:, 0])

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return answers
