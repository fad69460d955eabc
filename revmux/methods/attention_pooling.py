"""Attention pooling: the own state of each plain input, with a learned attention over its tokens in place of their mean.

An input's answer may be in a few of its tokens, above all in the lower layers, where the answer position has not gathered
it yet. The attention has d + 1 weights and starts uniform.
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

    def own_states(self, backbone: Backbone, state: HiddenState) -> Tensor:
        """[answer state ; weighted mean over the tokens, those of a constant prefix included], at any depth: (B, 2d)."""
        relevance = self(state.hidden.to(self.weight.dtype)).squeeze(-1)  # (B, S)
        relevance = relevance.masked_fill(~state.mask, -torch.inf)
        constant = None if state.prefix is None else state.prefix.hidden[state.depth]  # (1, P, d)
        if constant is not None:
            shared = self(constant.to(self.weight.dtype)).squeeze(-1)  # (1, P)
            relevance = torch.cat([relevance, shared.expand(len(relevance), -1)], dim=1)  # (B, S + P)
        weight = relevance.softmax(dim=1).to(state.hidden.dtype)
        own = weight[:, : state.hidden.shape[1]]  # (B, S)
        mean = (own.unsqueeze(-1) * state.hidden).sum(dim=1)  # (B, d)
        if constant is not None:
            mean = mean + weight[:, state.hidden.shape[1] :] @ constant[0]
        return torch.cat([backbone.own_answers(state), mean], dim=-1)
