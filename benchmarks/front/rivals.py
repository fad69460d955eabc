"""Rivals that need no training: upper layers left out, tokens pruned by attention, and int8 weights, alone and combined."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparison.systems import Ready
from benchmarks.trained import Run
from revmux.adapters.folder import load_adapter
from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.plan.config import MeasureConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained

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


def rival_rows(ready: Ready, mixed: Run | None, measuring: MeasureConfig) -> list[dict[str, Any]]:
    """The rows of all rivals on the test split, timed in pairs with SISO.

    Args:
        ready: the task.
        mixed: a trained run of RevMUX without LoRA, to combine with int8 weights; None leaves the combination out.
        measuring: how throughput is measured.
    """
    pretrained = load_pretrained(ready.backbone)
    backbone = pretrained.backbone.freeze()
    plain = plain_classifier(backbone)
    split = pretrained.tokenize(ready.task.test, ready.backbone.max_length)
    everything = like_length_batches(split, len(split), 64)
    timed = like_length_batches(split, measuring.throughput_inputs, measuring.throughput_batch)
    labels = split.labels[torch.linspace(0, len(split) - 1, len(split)).long()[split.lengths.argsort()]]
    siso = _accuracy(plain, everything, labels)
    rows = []
    for title, model, cost, extra in _rivals(backbone, mixed, pretrained):
        model.eval()
        ratio = paired_throughput(plain, model, timed, measuring.throughput_pairs)  # type: ignore[arg-type]
        rows.append(
            {
                "table": "front",
                "title": title,
                "method": "rival",
                "recipe": None,
                "lora_rank": 0,
                "num_inputs": 1,
                "prefill_layers": 0,
                "exit_layer": None,
                "fallback": 0,
                "tunable_params": 0,
                "seeds": 1,
                "accuracy_mean": _accuracy(model, everything, labels),
                "accuracy_std": None,
                "siso_accuracy": siso,
                "cost_counted": cost,
                "throughput_ratio": ratio.median,
                "throughput_pairs": asdict(ratio),
            }
            | extra
        )
    return rows


def _rivals(
    backbone: Backbone, mixed: Run | None, pretrained: Pretrained
) -> Iterator[tuple[str, nn.Module, float | None, dict[str, Any]]]:
    depth = backbone.num_layers
    for layer in (depth // 2, depth - 2, depth - 1):
        yield f"Upper layers left out, {layer} of {depth} kept", WithoutUpperLayers(backbone, layer), layer / depth, {}
    for layer in (1, depth // 2):
        share = (layer + PRUNED_SHARE * (depth - layer)) / depth
        yield f"Tokens pruned by attention after layer {layer}, half kept", PrunedTokens(backbone, layer), share, {}
    small = quantized(backbone)
    yield "int8 weights", plain_classifier(small), None, {"quantization": "int8"}
    if mixed is not None:
        adapter = load_adapter(json.loads(mixed.result.read_text())["adapter"], pretrained)
        both = MultiplexedClassifier(small, adapter.method, adapter.prefill_layers)
        yield (
            f"int8 weights and {mixed.title}",
            both,
            None,
            {"quantization": "int8", "num_inputs": both.num_inputs, "prefill_layers": both.prefill_layers},
        )


@torch.no_grad()
def _accuracy(model: nn.Module, batches: list[TokenBatch], labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(tokens).argmax(-1) for tokens in batches])
    return float((found == labels).double().mean())
