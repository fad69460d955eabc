"""ModernBERT: rotary positions, global and sliding layers by type, a final norm, CLS or mean pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from revmux.backbone.base import Backbone, as_attention_mask, dense, padding_mask, visibility
from revmux.backbone.positions import count_positions, distances, in_order
from revmux.backbone.registry import register_backbone
from revmux.backbone.state import HiddenState, TokenBatch


@register_backbone
class ModernBertBackbone(Backbone):
    """``ModernBertForSequenceClassification`` cut at any layer."""

    model_types: ClassVar[tuple[str, ...]] = ("modernbert",)

    @property
    def pools_mean(self) -> bool:
        """Whether the head reads the mean over tokens instead of CLS."""
        return bool(self.config.classifier_pooling == "mean")

    @property
    def shared_answer(self) -> bool:  # type: ignore[override]
        """True for CLS; a mean is taken over each input's own tokens."""
        return not self.pools_mean

    def embed(self, tokens: TokenBatch) -> HiddenState:
        hidden = self.model.model.embeddings(input_ids=tokens["input_ids"])  # (B, S, d)
        mask = padding_mask(tokens)
        return HiddenState(
            hidden=hidden,
            mask=mask,
            answer=torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device),
            depth=0,
            positions=count_positions(hidden),
            spans=mask.unsqueeze(1) if self.pools_mean else None,  # (B, 1, S)
        )

    def layer(self, index: int) -> nn.Module:
        return self.model.model.layers[index]

    def layer_arguments(self, state: HiddenState) -> Callable[[int], dict[str, Any]]:
        positions = count_positions(state.hidden) if state.positions is None else state.positions
        masks = self._masks(state, positions)
        kinds = self.config.layer_types
        rotary = {kind: self.model.model.rotary_emb(state.hidden, positions, kind) for kind in set(kinds)}
        return lambda index: {
            "attention_mask": masks[kinds[index]],
            "position_embeddings": rotary[kinds[index]],
        }

    def _masks(self, state: HiddenState, positions: Tensor) -> dict[str, Tensor | None]:
        """The mask of each layer type. The window is over positions, not over indices in the sequence."""
        implementation, dtype = self.config._attn_implementation, state.hidden.dtype
        if state.segments is None and in_order(positions):
            arguments = {"config": self.config, "inputs_embeds": state.hidden, "attention_mask": state.mask}
            return {
                "full_attention": dense(create_bidirectional_mask(**arguments)),
                "sliding_attention": dense(create_bidirectional_sliding_window_mask(**arguments)),
            }
        segments = state.mask.long() if state.segments is None else state.segments
        everywhere = visibility(replace(state, segments=segments), dtype, "sdpa")  # (B, 1, S, S) bool
        assert everywhere is not None
        seen = everywhere.squeeze(1)  # (B, S, S)
        near = distances(positions).abs() <= self.config.sliding_window  # (B, S, S)
        return {
            "full_attention": as_attention_mask(seen, dtype, implementation),
            "sliding_attention": as_attention_mask(seen & near, dtype, implementation),
        }

    def answers(self, state: HiddenState) -> Tensor:
        state = replace(state, hidden=self.normalize(state.hidden))  # (B, S, d)
        return mean_over_spans(state) if self.pools_mean else state.read()

    def normalize(self, hidden: Tensor) -> Tensor:
        return self.model.model.final_norm(hidden)

    def own_answers(self, state: HiddenState) -> Tensor:
        return self.answers(state)[:, 0] if self.pools_mean else super().own_answers(state)

    def readout(self, answer: Tensor) -> Tensor:
        return self.model.head(answer)

    def score(self, vector: Tensor) -> Tensor:
        return self.model.classifier(self.model.drop(vector))


def mean_over_spans(state: HiddenState) -> Tensor:
    """The mean of each input's own tokens: (B, A, d)."""
    assert state.spans is not None
    means = [
        (state.hidden * span.unsqueeze(-1)).sum(dim=1) / span.sum(dim=1, keepdim=True)  # (B, d)
        for span in state.spans.unbind(dim=1)
    ]
    return torch.stack(means, dim=1)
