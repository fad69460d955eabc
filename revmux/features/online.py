"""Features that are computed per batch, without a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revmux.backbone import Backbone
from revmux.data.tokens import SplitTokens
from revmux.features.base import FeatureBatch


class OnlineFeatures:
    """Tokens and, optionally, the teacher, computed per batch.

    Args:
        split: the tokens.
        backbone: the teacher. Its device is the device of the batches.
        with_teacher: whether the plain model's answer is computed too, without gradients and in eval mode.
        prefill_layers: l. The teacher's pass then also returns the states at depth l, so that no layer runs twice. With
            None, the model computes the prefill.
    """

    def __init__(
        self,
        split: SplitTokens,
        backbone: Backbone,
        with_teacher: bool = True,
        prefill_layers: int | None = None,
    ) -> None:
        self.split = split
        self.backbone = backbone
        self.with_teacher = with_teacher
        self.prefill_layers = prefill_layers
        self.labels, self.lengths = split.labels, split.lengths

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """See :meth:`revmux.features.base.Features.batch`."""
        device = self.backbone.device
        tokens = self.split.batch(rows, device)
        labels = self.labels[torch.as_tensor(rows)].long().to(device)
        if not self.with_teacher:
            return FeatureBatch(labels, tokens=tokens)
        with torch.no_grad():
            prefilled = self.backbone.run(self.backbone.embed(tokens), self.prefill_layers or 0)
            state = self.backbone.run(prefilled, self.backbone.num_layers)
            vectors = self.backbone.readout(self.backbone.answers(state)[:, 0])  # (B, r)
            return FeatureBatch(
                labels,
                tokens=tokens,
                prefilled=None if self.prefill_layers is None else prefilled,
                teacher_vectors=vectors,
                teacher_scores=self.backbone.score(vectors),
            )
