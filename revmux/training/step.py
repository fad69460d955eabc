"""The forward pass of a training step: from a batch and its groups to the losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revmux.backbone.base import padding_mask
from revmux.features.base import FeatureBatch
from revmux.model import MultiplexedClassifier
from revmux.training.config import LossConfig
from revmux.training.losses import ContrastSet, training_loss


class TrainStep(nn.Module):
    """Model and loss as one module, so that data-parallel training wraps one forward call.

    Args:
        model: the multiplexed classifier.
        loss: the training loss.
        half_width: whether the model runs under bfloat16 autocast; the losses are computed outside autocast.
    """

    def __init__(self, model: MultiplexedClassifier, loss: LossConfig, half_width: bool = False) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.half_width = half_width

    def forward(
        self,
        batch: FeatureBatch,
        groups: Tensor,
        teachers: Tensor | None = None,
        warmup: bool = False,
        candidates: ContrastSet | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            batch: B inputs.
            groups: (G, N) long, rows of the batch.
            teachers: (G, N, r), as returned by :meth:`teachers`.
            warmup: whether to train on the method's auxiliary loss alone.
            candidates: see :func:`revmux.training.losses.infonce`.
        """
        method = self.model.method
        with torch.autocast(groups.device.type, torch.bfloat16, enabled=self.half_width):
            output = self.model.run_batch(batch.tokens, batch.prefilled, groups)
        losses = training_loss(
            output.scores,
            output.vectors,
            batch.labels[groups],
            teachers,
            None if batch.teacher_scores is None else batch.teacher_scores[groups].float(),
            self.loss,
            candidates,
        )
        if method.has_auxiliary_loss:
            assert output.shared is not None
            assert batch.tokens is not None
            token_ids, mask = batch.tokens["input_ids"][groups], padding_mask(batch.tokens)[groups]  # (G, N, S)
            losses["auxiliary"] = method.auxiliary_loss(self.model.backbone, output.shared, token_ids, mask)
            losses["loss"] = losses["auxiliary"] + (0.0 if warmup else 1.0) * losses["loss"]
        return losses

    def teachers(self, batch: FeatureBatch, groups: Tensor) -> Tensor | None:
        """The vectors that the groups' restored vectors must match, (G, N, r) in float32; None if there are none."""
        if batch.teacher_vectors is None or not self.model.method.matches_teacher:
            return None
        return batch.teacher_vectors[groups].float()
