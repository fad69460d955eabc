"""Own-state correction: each restored state is corrected by the input's own prefilled state, which costs almost nothing.

The own state is [answer state ; mean over the input's tokens] after layer l, normalized in families with a final norm. The
mean matters if the answer token holds little at layer l, as in an encoder that was pretrained with mean pooling. All
corrections start at zero::

    linear:     ĥ_k + W h_k
    mlp:        ĥ_k + W_2 gelu(W_1 [ĥ_k ; h_k])
    attention:  the same as mlp, with an attention-weighted mean, see :mod:`revmux.methods.attention_pooling`
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState
from revmux.errors import one_of
from revmux.methods.attention_pooling import AttentionPooling

OwnStateKind = Literal["none", "linear", "mlp", "attention"]


class CorrectedMethod:
    """What methods with an own-state correction share: their demultiplexer receives what the correction reads."""

    own_state: OwnStateCorrection

    def own_states(self, backbone: Backbone, prefilled: HiddenState) -> Tensor:
        """See :meth:`revmux.methods.base.Method.own_states`."""
        return self.own_state.own_states(backbone, prefilled)


class OwnStateCorrection(nn.Module):
    """Corrects restored answer states.

    Args:
        hidden: d.
        kind: ``linear``, ``mlp`` or ``attention``; ``none`` corrects nothing.

    Raises:
        UserError: an unknown kind.
    """

    def __init__(self, hidden: int, kind: OwnStateKind) -> None:
        super().__init__()
        if kind not in get_args(OwnStateKind):
            raise one_of("own_state", kind, get_args(OwnStateKind), "choose one of these")
        self.kind = kind
        self.attention = AttentionPooling(hidden) if kind == "attention" else None
        if kind in ("mlp", "attention"):
            self.inner = nn.Linear(3 * hidden, hidden)
            self.outer = nn.Linear(hidden, hidden)
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        elif kind == "linear":
            self.outer = nn.Linear(2 * hidden, hidden, bias=False)
            nn.init.zeros_(self.outer.weight)

    def own_states(self, backbone: Backbone, prefilled: HiddenState) -> Tensor:
        """The own state of each of B prefilled inputs: (B, 2d)."""
        if self.attention is None:
            return backbone.own_states(prefilled)
        return self.attention.own_states(backbone, prefilled)

    def forward(self, restored: Tensor, own: Tensor) -> Tensor:
        """Correct restored states.

        Args:
            restored: (..., d).
            own: (..., 2d), from :meth:`own_states`.

        Returns:
            (..., d).
        """
        if self.kind == "none":
            return restored
        if self.kind == "linear":
            return restored + self.outer(own)
        return restored + self.outer(F.gelu(self.inner(torch.cat([restored, own], dim=-1))))
