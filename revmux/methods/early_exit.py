"""Early exit: the common part of methods that read each input alone at one layer e, with N = 1."""

from __future__ import annotations

from typing import Any, ClassVar

from revmux.backbone import HiddenState
from revmux.errors import UserError
from revmux.methods.base import BackboneShape, Method


class EarlyExit(Method):
    """A method whose options have ``layer``, the layer e after which answers are read, from 0 (embeddings) to L."""

    exit_option: ClassVar[str | None] = "layer"
    fixed_num_inputs: ClassVar[int | None] = 1

    def __init__(self, shape: BackboneShape, num_inputs: int = 1, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        if not 0 <= self.options.layer <= shape.num_layers:
            raise UserError(
                f"{self.name}: layer is {self.options.layer}; this backbone has layers 0..{shape.num_layers}; "
                "choose one of these"
            )

    @classmethod
    def point_name(cls, num_inputs: int, prefill_layers: int) -> str:
        return f"layer {prefill_layers}"

    @classmethod
    def system_name(cls, num_inputs: int, prefill_layers: int) -> str:
        return f"{cls.title} at layer {prefill_layers}"

    @property
    def reads_own_states(self) -> bool:
        return True

    def exit_layer(self) -> int:
        return int(self.options.layer)

    def multiplex(self, states: HiddenState) -> HiddenState:
        return states.map(lambda tensor: tensor[:, 0])
