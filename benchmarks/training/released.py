"""A training step as the paper's released code does it, on our modules: what the feature store is measured against.

There nothing is frozen but the optimiser's list: the prefill and the upper layers keep a graph for every weight, the
teacher runs from the prefilled states at every step, and the whole shared sequence is demultiplexed, not the answer alone.
Its anomaly detection, a debugging mode that slows autograd down further, is left out.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from revmux.backbone import HiddenState, TokenBatch
from revmux.data.tokens import TokenizedSplit
from revmux.grouping import local_rows
from revmux.model import GroupOutput, MultiplexedClassifier
from revmux.training.config import LossConfig
from revmux.training.losses import training_loss


class ReleasedModel(MultiplexedClassifier):
    """A multiplexed encoder whose backbone keeps its graph and whose every token is demultiplexed."""

    def prefill(self, tokens: TokenBatch) -> HiddenState:
        """Each input alone through layers 1..l, with gradients: tokens (B, S) to states (B, S, d)."""
        return self.backbone.run(self.backbone.embed(tokens), self.prefill_layers)

    def upper_in_training(self, mixed: HiddenState) -> HiddenState:
        """Every token through every layer, since every token is demultiplexed."""
        return self.upper(mixed)

    def answer(self, upper: HiddenState, own: Tensor) -> GroupOutput:
        """As the parent's, by way of every token of the shared sequences (G, S, d)."""
        rows, length, width = upper.hidden.shape
        everywhere = own.unsqueeze(1).expand(-1, length, -1, -1).flatten(0, 1)  # (G·S, N, d)
        restored = self.method.demultiplex(upper.hidden.reshape(rows * length, 1, width), everywhere)  # (G·S, N, d)
        answers = restored.unflatten(0, (rows, length))[:, 0]  # (G, N, d), at the CLS
        vectors = self.method.vector(self.backbone, answers)
        return GroupOutput(answers, vectors, self.method.score(self.backbone, vectors))


class ReleasedTraining:
    """Epochs of that step.

    Args:
        model: with every weight of the backbone asking for gradients.
        split: the tokens.
        loss: the same as the rival's.
        learning_rate: of AdamW over the adapters.
    """

    def __init__(self, model: ReleasedModel, split: TokenizedSplit, loss: LossConfig, learning_rate: float) -> None:
        self.model, self.split, self.loss = model, split, loss
        self.optimizer = torch.optim.AdamW(model.method.parameters(), lr=learning_rate, fused=True)

    def epoch(self, schedule: Tensor) -> float:
        """One pass; returns its seconds.

        Args:
            schedule: (steps, G, N) long, rows of the split.
        """
        backbone = self.model.backbone
        self.model.method.train()
        started = time.perf_counter()
        for groups in schedule:
            rows, inside = local_rows(groups)
            prefilled = self.model.prefill(self.split.batch(rows))
            output = self.model.run_groups(prefilled, inside)
            with torch.no_grad():
                last = backbone.run(prefilled, backbone.num_layers)
                teacher = backbone.readout(backbone.answers(last)[:, 0])  # (B, r)
            labels = self.split.labels[torch.as_tensor(rows)][inside]
            losses = training_loss(output.scores, output.vectors, labels, teacher[inside], None, self.loss)
            self.model.zero_grad(set_to_none=True)
            losses["loss"].backward()
            self.optimizer.step()
        return time.perf_counter() - started
