"""RevMUX: a reversible multiplexer, with its inverse as the demultiplexer (paper section 3).

Multiplexer, for N slots of width d/N and one function f_k per slot::

    i_k = f_down(h_k)                                   # d → d/N
    o_1 = i_1 + f_1(i_2)
    o_k = i_k + f_k(o_{k-1})            k = 2..N        # f_1 = F, f_2 = G for N = 2
    o   = concat[o_1 .. o_N]                            # contiguous blocks of d/N channels

Demultiplexer, at the answer position only, with the same functions::

    î_k = ô_k − f_k(ô_{k-1})            k = N..2
    î_1 = ô_1 − f_1(î_2)
    ĥ_k = f_up(î_k)                                     # d/N → d

The own state of each input after the prefill can correct ĥ_k, see :mod:`revmux.methods.own_state`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.errors import UserError, one_of
from revmux.methods.base import BackboneShape, Method, checked_exit_layer, divide_width, mix_channels, pick_own
from revmux.methods.own_state import CorrectedMethod, OwnStateCorrection, OwnStateKind
from revmux.methods.registry import register_method

UpKind = Literal["mlp", "inverse", "zero"]


@dataclass(frozen=True)
class RevMUXOptions:
    """Settings of RevMUX. The defaults have the paper's shapes and an exact inverse.

    Args:
        dropout: dropout inside the slot functions in training. The released code applies 0.1 after both
            layers, in the multiplexer and the demultiplexer, so they are not exact inverses. With 0 they are.
        output_relu: whether a ReLU follows the slot functions' second layer, as in the released code. Without
            it, the functions can also subtract.
        zero_init: whether to initialize the slot functions' last layer to zero, so that mixing starts as
            concatenation.
        activation: the nonlinearity inside the slot functions: relu (the paper's) or gelu.
        up: f_up. ``mlp`` is the paper's, with two hidden layers of 3d. ``inverse`` and ``zero`` are a linear map plus a
            residual MLP that starts at zero. The linear map starts as the inverse of f_down, √N · f_downᵀ, or at zero.
        own_state: how each input's own prefilled state corrects its restored state: ``none``, ``linear``, ``mlp``
            or ``attention``. This adds almost no cost in serving, since the state is already available.
        lora_rank: rank of the low-rank updates of layers l+1..e. 0 means none.
        exit_layer: e, the layer after which answers are read. None means the last layer.
        tune_backbone: whether to train the backbone too (the tuned RevMUX of the paper).
    """

    dropout: float = 0.0
    output_relu: bool = False
    zero_init: bool = True
    activation: Literal["relu", "gelu"] = "relu"
    up: UpKind = "mlp"
    own_state: OwnStateKind = "none"
    lora_rank: int = 0
    exit_layer: int | None = None
    tune_backbone: bool = False


class SlotFunction(nn.Module):
    """One f_k of the chain: d/N → d → d/N.

    Args:
        width: d/N.
        hidden: width of the middle layer, d.
        options: dropout, output activation and initialization.
    """

    def __init__(self, width: int, hidden: int, options: RevMUXOptions) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(options.dropout)
        self.output_relu = options.output_relu
        self.activation = torch.relu if options.activation == "relu" else F.gelu
        if options.zero_init:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, slot: Tensor) -> Tensor:
        """Apply the function: (..., d/N) to (..., d/N)."""
        out = self.outer(self.dropout(self.activation(self.inner(slot))))
        return self.dropout(torch.relu(out)) if self.output_relu else self.dropout(out)


class ReversibleChain(nn.Module):
    """The invertible map from N slots to N mixed slots.

    Args:
        num_inputs: N, at least 2.
        width: d/N.
        hidden: width inside the slot functions.
        options: see :class:`RevMUXOptions`.
    """

    def __init__(self, num_inputs: int, width: int, hidden: int, options: RevMUXOptions) -> None:
        super().__init__()
        self.functions = nn.ModuleList(SlotFunction(width, hidden, options) for _ in range(num_inputs))

    def forward(self, slots: list[Tensor]) -> list[Tensor]:
        """Map i_1..i_N to o_1..o_N, each (..., d/N)."""
        mixed = [slots[0] + self.functions[0](slots[1])]
        for k in range(1, len(slots)):
            mixed.append(slots[k] + self.functions[k](mixed[k - 1]))
        return mixed

    def reverse(self, mixed: list[Tensor]) -> list[Tensor]:
        """Map o_1..o_N back to i_1..i_N, each (..., d/N)."""
        slots = [mixed[k] - self.functions[k](mixed[k - 1]) for k in range(1, len(mixed))]
        return [mixed[0] - self.functions[0](slots[0]), *slots]


class PaperUp(nn.Sequential):
    """The paper's up-projection: d/N → 3d → 3d → d with ReLUs."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(width, 3 * hidden),
            nn.ReLU(),
            nn.Linear(3 * hidden, 3 * hidden),
            nn.ReLU(),
            nn.Linear(3 * hidden, hidden),
        )


class LinearUp(nn.Module):
    """An up-projection of a linear map and a residual MLP, which starts at zero.

    As the inverse, restored states start at the scale that the model's head expects: an orthogonal down-projection keeps 1/N
    of the squared norm on average, so √N · f_downᵀ restores the norm. From zero, the shared pass does not dominate the
    own-state correction at first, which starts at zero too.

    Args:
        down: the down-projection, d → d/N, with orthogonal rows.
        inverse: whether the linear map starts as its inverse, instead of at zero.
    """

    def __init__(self, down: nn.Linear, inverse: bool) -> None:
        super().__init__()
        width, hidden = down.weight.shape
        self.linear = nn.Linear(width, hidden)
        self.inner = nn.Linear(width, 3 * hidden)
        self.outer = nn.Linear(3 * hidden, hidden)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if inverse:
            with torch.no_grad():
                self.linear.weight.copy_(math.sqrt(hidden / width) * down.weight.T)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, slot: Tensor) -> Tensor:
        """Apply the projection: (..., d/N) to (..., d)."""
        return self.linear(slot) + self.outer(F.gelu(self.inner(slot)))


@register_method
class RevMUX(CorrectedMethod, Method):
    """The method of the paper. Only the adapters are trained, unless ``tune_backbone`` is set."""

    name: ClassVar[str] = "revmux"
    marks: ClassVar[tuple[str, str]] = ("o", "circle")
    Options: ClassVar[type] = RevMUXOptions

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__(shape, num_inputs, options)
        if num_inputs < 2:
            raise UserError(f"revmux needs N = 2 or more inputs, not N = {num_inputs}; use siso for N = 1")
        for name, kind in (("activation", ("relu", "gelu")), ("up", get_args(UpKind))):
            if getattr(self.options, name) not in kind:
                raise one_of(name, getattr(self.options, name), kind, "choose one of these")
        width, hidden = divide_width(shape.hidden_size, num_inputs), shape.hidden_size
        self.tunes_backbone = self.options.tune_backbone
        self.last_layer = checked_exit_layer(self.name, self.options.exit_layer, shape.num_layers)
        self.down = nn.Linear(hidden, width)
        self.chain = ReversibleChain(num_inputs, width, hidden, self.options)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up = (
            PaperUp(width, hidden) if self.options.up == "mlp" else LinearUp(self.down, self.options.up == "inverse")
        )
        self.own_state = OwnStateCorrection(hidden, self.options.own_state)

    def exit_layer(self) -> int:
        return self.last_layer

    def multiplex(self, states: HiddenState) -> HiddenState:
        # The slot of an input is zero at its padding, so padding does not affect the other inputs.
        slots = self.down(states.hidden) * states.mask.unsqueeze(-1)  # (G, N, S, d/N)
        mixed = torch.cat(self.chain(list(slots.unbind(dim=1))), dim=-1)  # (G, S, d)
        return mix_channels(states, mixed, self.shape.shared_answer)

    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        mixed = list(answers.chunk(self.num_inputs, dim=-1))  # N × (G, A, d/N)
        slots = torch.stack(self.chain.reverse(mixed), dim=2)  # (G, A, N, d/N)
        return self.own_state(self.up(pick_own(slots)), own)  # (G, N, d)
