"""Attention pooling: the own state of each plain input, with a learned attention over its tokens in place of their mean.

An input's answer may be in a few of its tokens, above all in the lower layers, where the answer position has not gathered
it yet. The attention has d weights and starts uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState


class AttentionPooling(nn.Linear):
    """Weighs each token by the softmax of a linear map of its state.

    Args:
        hidden: d.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.bias.requires_grad_(False)  # no softmax depends on it; adapters contain it

    def own_states(self, backbone: Backbone, state: HiddenState) -> Tensor:
        """[answer state ; weighted mean over the tokens, those of a constant prefix included], at any depth: (B, 2d).

        All states are normalized, see :meth:`revmux.backbone.Backbone.normalize`.
        """
        hidden = backbone.normalize(state.hidden).to(self.weight.dtype)  # (B, S, d)
        relevance = self(hidden).squeeze(-1).masked_fill(~state.mask, -torch.inf)  # (B, S)
        if state.prefix is None:
            mean = (relevance.softmax(dim=1).unsqueeze(-1) * hidden).sum(dim=1)  # (B, d)
        else:
            constant = backbone.normalize(state.prefix.hidden[state.depth]).to(self.weight.dtype)  # (1, P, d)
            shared = self(constant).squeeze(-1).expand(len(hidden), -1)  # (B, P)
            own, common = (
                torch.cat([relevance, shared], dim=1).softmax(dim=1).split([hidden.shape[1], constant.shape[1]], dim=1)
            )  # (B, S), (B, P)
            mean = (own.unsqueeze(-1) * hidden).sum(dim=1) + common @ constant[0]
        return torch.cat([backbone.own_answers(state).to(mean.dtype), mean], dim=-1)
