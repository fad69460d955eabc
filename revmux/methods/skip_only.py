"""Skip-only control: what the own-state correction and the model's own head achieve without the shared pass, with N = 1.

It costs l of L layers. A multiplexed method with the same prefill and the same correction gains from its shared pass only
what it answers better than this control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.errors import UserError
from revmux.methods.base import BackboneShape
from revmux.methods.early_exit import EarlyExit
from revmux.methods.own_state import CorrectedMethod, OwnStateCorrection, OwnStateKind
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class SkipOnlyOptions:
    """Settings of the control.

    Args:
        layer: l, the layer whose states are corrected, from 0 (embeddings) to L.
        own_state: how the state at the answer position is corrected: ``linear``, ``mlp`` or ``attention``.
    """

    layer: int = 1
    own_state: OwnStateKind = "mlp"


@register_method
class SkipOnly(CorrectedMethod, EarlyExit):
    """The own-state correction alone, read by the model's own head."""

    name: ClassVar[str] = "skip-only"
    title: ClassVar[str] = "skip-only control"
    marks: ClassVar[tuple[str, str]] = ("x", "x")
    Options: ClassVar[type] = SkipOnlyOptions

    def __init__(self, shape: BackboneShape, num_inputs: int = 1, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        if self.options.own_state == "none":
            raise UserError(
                "skip-only: own_state is 'none', which leaves nothing to train; choose linear, mlp or attention"
            )
        self.own_state = OwnStateCorrection(shape.hidden_size, self.options.own_state)

    @classmethod
    def describe(cls, num_inputs: int, prefill_layers: int) -> str:
        return f"the skip-only control at layer {prefill_layers}"

    def read(self, backbone: Backbone, state: HiddenState) -> Tensor:
        return backbone.own_answers(state).unsqueeze(1)  # (B, 1, d)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return self.own_state(answers, own)
