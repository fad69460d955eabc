"""Only multiplexer reversible: the multiplexer of RevMUX and an MLP demultiplexer (an ablation in the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.errors import UserError
from revmux.methods.base import BackboneShape, Method, divide_width, mix_channels
from revmux.methods.own_state import CorrectedMethod, OwnStateCorrection, OwnStateKind
from revmux.methods.registry import register_method
from revmux.methods.revmux import ReversibleChain, RevMUXOptions
from revmux.methods.vanilla_adapter import VanillaDemultiplexer


@dataclass(frozen=True)
class OnlyMultiplexerReversibleOptions:
    """Settings of the reversible multiplexer, as in :class:`RevMUXOptions`.

    Args:
        dropout: dropout inside the slot functions in training.
        output_relu: whether a ReLU follows the slot functions' second layer.
        zero_init: whether to initialize the slot functions' last layer to zero.
        own_state: how each input's own prefilled state corrects its restored state: ``none``, ``linear``,
            ``mlp`` or ``attention``.
    """

    dropout: float = 0.0
    output_relu: bool = False
    zero_init: bool = True
    own_state: OwnStateKind = "none"


@register_method
class OnlyMultiplexerReversible(CorrectedMethod, Method):
    """Down-projection and reversible chain as multiplexer, vanilla MLP as demultiplexer."""

    name: ClassVar[str] = "only-multiplexer-reversible"
    Options: ClassVar[type] = OnlyMultiplexerReversibleOptions

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        if num_inputs < 2:
            raise UserError(f"{self.name} needs N = 2 or more inputs, not N = {num_inputs}; use siso for N = 1")
        width, hidden = divide_width(shape.hidden_size, num_inputs), shape.hidden_size
        settings = RevMUXOptions(self.options.dropout, self.options.output_relu, self.options.zero_init)
        self.down = nn.Linear(hidden, width)
        self.chain = ReversibleChain(num_inputs, width, hidden, settings)
        self.demultiplexer = VanillaDemultiplexer(hidden, num_inputs)
        self.own_state = OwnStateCorrection(hidden, self.options.own_state)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def multiplex(self, states: HiddenState) -> HiddenState:
        slots = self.down(states.hidden) * states.mask.unsqueeze(-1)  # (G, N, S, d/N)
        mixed = torch.cat(self.chain(list(slots.unbind(dim=1))), dim=-1)  # (G, S, d)
        return mix_channels(states, mixed, self.shape.shared_answer)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return self.own_state(self.demultiplexer(answers), own)  # (G, N, d)
