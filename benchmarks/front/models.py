"""What the rivals run: the plain model without its upper layers, with pruned tokens, or with smaller weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.data.tokens import TokenizedSplit
from revmux.estimate.throughput import like_length_batches

PRUNED_SHARE = 0.5
"""Share of an input's tokens that pruning keeps."""


class WithoutUpperLayers(nn.Module):
    """The plain model without its layers above e: its own head reads layer e."""

    def __init__(self, backbone: Backbone, layer: int) -> None:
        super().__init__()
        self.backbone, self.layer = backbone, layer

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Label scores: tokens (B, S) to (B, C)."""
        state = self.backbone.run(self.backbone.embed(tokens), self.layer)
        return self.backbone.classify(self.backbone.answers(state)[:, 0])


class PrunedTokens(nn.Module):
    """The plain model of BERT's family, which keeps after layer l the tokens that receive most attention there."""

    def __init__(self, backbone: Backbone, layer: int) -> None:
        super().__init__()
        self.backbone, self.layer = backbone, layer

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Label scores: tokens (B, S) to (B, C)."""
        state = self.backbone.run(self.backbone.embed(tokens), self.layer - 1)
        received = self._attention(state)  # (B, S)
        state = self.backbone.run(state, self.layer)
        received = received.masked_fill(~state.mask, -torch.inf)
        received[:, 0] = torch.inf  # the answer token
        most = max(1, round(PRUNED_SHARE * state.mask.shape[1]))
        kept = received.topk(most, dim=1).indices.sort(dim=1).values  # (B, K)
        hidden = state.hidden.gather(1, kept.unsqueeze(-1).expand(-1, -1, state.hidden.shape[-1]))  # (B, K, d)
        pruned = HiddenState(hidden, state.mask.gather(1, kept), torch.zeros_like(kept[:, :1]), self.layer)
        above = self.backbone.run(pruned, self.backbone.num_layers)
        return self.backbone.classify(self.backbone.answers(above)[:, 0])

    def _attention(self, state: HiddenState) -> Tensor:
        """The attention that each token receives in layer l, the mean over heads and queries: (B, S)."""
        own: Any = self.backbone.layer(self.layer - 1)
        heads = self.backbone.config.num_attention_heads
        query, key = (
            project(state.hidden).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, S, d/H)
            for project in (own.attention.self.query, own.attention.self.key)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (B, H, S, S)
        weights = scores.masked_fill(~state.mask[:, None, None], -torch.inf).softmax(-1)
        received: Tensor = (weights * state.mask[:, None, :, None]).sum(dim=2).mean(dim=1)
        return received


def quantized(backbone: Backbone) -> Backbone:
    """A copy whose linear maps have int8 weights and quantize their inputs when they run."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favor of torchao, which has no wheel for every CPU
        made: Backbone = quantize_dynamic(copy.deepcopy(backbone), {nn.Linear}, torch.qint8)
    return made


@torch.no_grad()
def accuracy(model: nn.Module, split: TokenizedSplit) -> float:
    """The share of a split that a model, which is put into eval mode, classifies correctly."""
    model.eval()
    rows = torch.linspace(0, len(split) - 1, len(split)).long()
    labels = split.labels[rows[split.lengths[rows].argsort()]]  # in the order of the batches
    found = torch.cat([model(tokens).argmax(-1) for tokens in like_length_batches(split, len(split), 64)])
    return float((found == labels).double().mean())
