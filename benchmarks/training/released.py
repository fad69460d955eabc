"""The training step of the paper's released code, on our modules: the baseline for the feature store.

The released code freezes weights only by leaving them out of the optimiser: prefill and upper layers keep a graph for
every weight, the teacher runs from the prefilled states at every step, and the whole shared sequence is demultiplexed,
not only the answer. Its anomaly detection, a debugging mode that slows autograd down further, is left out.
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
    """A multiplexed encoder that keeps the backbone's graph and demultiplexes every token."""

    def prefill(self, tokens: TokenBatch) -> HiddenState:
        """Run each input alone through layers 1..l, with gradients: tokens (B, S) to states (B, S, d)."""
        return self.backbone.run(self.backbone.embed(tokens), self.prefill_layers)

    def upper_in_training(self, mixed: HiddenState) -> HiddenState:
        """Run every token through every upper layer, because every token is demultiplexed."""
        return self.upper(mixed)

    def answer(self, upper: HiddenState, own: Tensor) -> GroupOutput:
        """Return the same answers as the parent, after demultiplexing every token of the shared sequences (G, S, d)."""
        rows, length, width = upper.hidden.shape
        everywhere = own.unsqueeze(1).expand(-1, length, -1, -1).flatten(0, 1)  # (G·S, N, d)
        restored = self.method.demultiplex(upper.hidden.reshape(rows * length, 1, width), everywhere)  # (G·S, N, d)
        answers = restored.unflatten(0, (rows, length))[:, 0]  # (G, N, d), at the CLS
        vectors = self.method.vector(self.backbone, answers)
        return GroupOutput(answers, vectors, self.method.score(self.backbone, vectors))


class ReleasedTraining:
    """Epochs of the released training step.

    Args:
        model: the model; every weight of its backbone requires gradients.
        split: the tokenized inputs.
        loss: loss settings, the same as for our trainer.
        learning_rate: learning rate of AdamW for the adapters.
    """

    def __init__(self, model: ReleasedModel, split: TokenizedSplit, loss: LossConfig, learning_rate: float) -> None:
        self.model, self.split, self.loss = model, split, loss
        self.optimizer = torch.optim.AdamW(model.method.parameters(), lr=learning_rate, fused=True)

    def epoch(self, schedule: Tensor) -> float:
        """Run one epoch; return its seconds.

        Args:
            schedule: row indices of the split, (steps, G, N), int64.
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
