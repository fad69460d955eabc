"""Vanilla adapters: one MLP mixes the inputs and another MLP separates them. Neither is reversible.

::

    o   = mlp_mux(concat[map(h_1) .. map(h_N)])          # N·d → 3d → d
    ĥ_1..ĥ_N = mlp_demux(ô)                              # d → 3d → 3d → N·d, at the answer position
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.methods.base import BackboneShape, Method, mix_channels, pick_own
from revmux.methods.own_state import CorrectedMethod, OwnStateCorrection, OwnStateKind
from revmux.methods.registry import register_method


@dataclass(frozen=True)
class VanillaAdapterOptions:
    """Settings of the vanilla adapters.

    Args:
        dropout: dropout after the multiplexer's layers in training. The released code uses 0.1.
        output_relu: whether a ReLU follows the multiplexer's second layer, as in the released code.
        own_state: how each input's own prefilled state corrects its restored state: ``none``, ``linear``,
            ``mlp`` or ``attention``.
    """

    dropout: float = 0.0
    output_relu: bool = False
    own_state: OwnStateKind = "none"


class VanillaDemultiplexer(nn.Module):
    """An MLP from one shared answer state to N answer states: d → 3d → 3d → N·d.

    Args:
        hidden: d.
        num_inputs: N.
    """

    def __init__(self, hidden: int, num_inputs: int) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.layers = nn.Sequential(
            nn.Linear(hidden, 3 * hidden),
            nn.ReLU(),
            nn.Linear(3 * hidden, 3 * hidden),
            nn.ReLU(),
            nn.Linear(3 * hidden, num_inputs * hidden),
        )

    def forward(self, answers: Tensor) -> Tensor:
        """Map shared answer states (G, A, d) to one answer state per input (G, N, d)."""
        slots = self.layers(answers).unflatten(-1, (self.num_inputs, -1))  # (G, A, N, d)
        return pick_own(slots)


@register_method
class VanillaAdapter(CorrectedMethod, Method):
    """The first baseline of the paper: MLP multiplexer and MLP demultiplexer."""

    name: ClassVar[str] = "vanilla-adapter"
    Options: ClassVar[type] = VanillaAdapterOptions

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        hidden = shape.hidden_size
        self.mapping = nn.Linear(hidden, hidden)
        self.inner = nn.Linear(num_inputs * hidden, 3 * hidden)
        self.outer = nn.Linear(3 * hidden, hidden)
        self.dropout = nn.Dropout(self.options.dropout)
        self.demultiplexer = VanillaDemultiplexer(hidden, num_inputs)
        self.own_state = OwnStateCorrection(hidden, self.options.own_state)

    def multiplex(self, states: HiddenState) -> HiddenState:
        # The slot of an input is zero at its padding, so padding does not affect the other inputs.
        slots = self.mapping(states.hidden) * states.mask.unsqueeze(-1)  # (G, N, S, d)
        side_by_side = slots.transpose(1, 2).flatten(2)  # (G, S, N·d)
        mixed = self.outer(self.dropout(torch.relu(self.inner(side_by_side))))  # (G, S, d)
        if self.options.output_relu:
            mixed = torch.relu(mixed)
        return mix_channels(states, self.dropout(mixed), self.shape.shared_answer)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        return self.own_state(self.demultiplexer(answers), own)  # (G, N, d)
