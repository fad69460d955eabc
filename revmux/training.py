"""The training loop: adapters on a frozen backbone, or a task model itself (SISO with the backbone unfrozen).

It runs on one process, or on every worker of a torch.distributed group that the caller has set up, and
knows nothing of who that is. Each epoch is yielded as a report; the caller logs, saves and stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revmux.errors import UserError
from revmux.evaluation import evaluate
from revmux.features import FeatureBatch, Features
from revmux.grouping import epoch_groups, local_rows
from revmux.losses import LossConfig, training_loss
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move.

    Args:
        epochs: passes over the training data.
        batch_size: inputs a step over all workers; a multiple of N times the number of workers.
        learning_rate: peak of AdamW's rate; the paper has 2e-5 over 50 epochs.
        weight_decay: AdamW's.
        warmup_share: share of the steps in which the rate rises; it then falls linearly to zero.
        clip: largest norm of the gradient.
        patience: epochs without a better selection accuracy after which training stops; 0 never stops early.
        seed: fixes weights, order and groups.
    """

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.06
    clip: float = 1.0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose a value above 0")
        for name in ("weight_decay", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share is {self.warmup_share}; choose a share from 0 to below 1")

    def check_groups(self, num_inputs: int, workers: int) -> None:
        """Refuse a batch that cannot be cut into groups of N for every worker.

        Raises:
            UserError: naming the batch, N, the workers and the nearest batch that works.
        """
        unit = num_inputs * workers
        if self.batch_size % unit:
            nearest = max(unit, round(self.batch_size / unit) * unit)
            raise UserError(
                f"batch_size ({self.batch_size}) must be divisible by num_inputs × workers "
                f"({num_inputs} × {workers} = {unit}); choose {nearest}"
            )


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    Attributes:
        epoch: 1-based.
        step: optimiser steps so far.
        metrics: mean training losses, selection accuracy and agreement, rates, seconds.
        is_best: whether the selection accuracy is the best so far.
        stop: whether training ends here.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    is_best: bool
    stop: bool


@dataclass
class TrainerState:
    """Where training stands, as a checkpoint keeps it."""

    epoch: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class TrainStep(nn.Module):
    """Model and loss as one module, so that data-parallel training wraps one forward call.

    Args:
        model: the multiplexed classifier.
        loss: what it is trained for.
    """

    def __init__(self, model: MultiplexedClassifier, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: FeatureBatch, groups: Tensor, warmup: bool = False) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: B inputs.
            groups: (G, N) long, rows of the batch.
            warmup: whether the method's auxiliary loss alone counts.
        """
        method = self.model.method
        if batch.prefilled is not None:
            output = self.model.run_groups(batch.prefilled, groups)
        else:
            assert batch.tokens is not None
            output = self.model.run_tokens(batch.tokens, groups)
        matches = method.matches_teacher and batch.teacher_vectors is not None
        losses = training_loss(
            output.scores,
            output.vectors,
            batch.labels[groups],
            batch.teacher_vectors[groups] if matches and batch.teacher_vectors is not None else None,
            batch.teacher_scores[groups] if batch.teacher_scores is not None else None,
            self.loss,
        )
        if method.has_auxiliary_loss:
            assert output.shared is not None
            assert batch.tokens is not None
            losses["auxiliary"] = method.auxiliary_loss(
                self.model.backbone, output.shared, batch.tokens["input_ids"][groups]
            )
            losses["loss"] = losses["auxiliary"] + (0.0 if warmup else 1.0) * losses["loss"]
        return losses


class Trainer:
    """Trains what the method says is to be trained.

    Args:
        model: on its device already.
        train: the training split.
        selection: the split that chooses the checkpoint; never the one reported.
        optim: see :class:`OptimConfig`.
        loss: see :class:`revmux.losses.LossConfig`.
        on_step: called on every worker after each step with (step, steps in all, metrics).

    Raises:
        UserError: the batch cannot be cut into groups, or nothing is left to train.
    """

    def __init__(
        self,
        model: MultiplexedClassifier,
        train: Features,
        selection: Features,
        optim: OptimConfig,
        loss: LossConfig,
        on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        self.rank, self.world = worker()
        optim.check_groups(model.num_inputs, self.world)
        self.model, self.train_data, self.selection = model, train, selection
        self.optim, self.loss, self.on_step = optim, loss, on_step
        self.state = TrainerState()
        step = TrainStep(model, loss)
        self.step: nn.Module = step
        if self.world > 1:
            # A tuned backbone has parts that an adapter may pass by: its own head, layers above the exit.
            self.step = DistributedDataParallel(step, find_unused_parameters=model.method.tunes_prefill)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise UserError(
                f"{model.method.name} has no weights to train on a frozen backbone; choose another method, or set its "
                "option tune_backbone"
            )
        self.optimizer = torch.optim.AdamW(self.parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay)
        self.groups_per_step = optim.batch_size // model.num_inputs
        self.steps_per_epoch = -(-len(train) // (self.groups_per_step * model.num_inputs))
        self.total_steps = self.steps_per_epoch * optim.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        warmup = math.ceil(self.optim.warmup_share * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))

    def run(self) -> Iterator[EpochReport]:
        """Train to the end, from wherever the state stands; one report an epoch, alike on every worker."""
        while not self._is_finished():
            started = time.perf_counter()
            metrics = self._epoch()
            seconds = time.perf_counter() - started
            chosen = evaluate(self.model, self.selection, shuffles=1, seed=self.optim.seed)
            metrics |= {
                "selection_accuracy": chosen.accuracy_mean,
                "selection_agreement": chosen.siso_agreement,
                "learning_rate": float(self.scheduler.get_last_lr()[0]),
                "inputs_per_second": len(self.train_data) / seconds,
                "steps_per_second": self.steps_per_epoch / seconds,
            }
            self.state.epoch += 1
            is_best = chosen.accuracy_mean > self.state.best_accuracy
            if is_best:
                self.state.best_accuracy, self.state.best_epoch = chosen.accuracy_mean, self.state.epoch
            self.state.history.append(metrics)
            yield EpochReport(self.state.epoch, self.state.step, metrics, is_best, self._is_finished())

    def _is_finished(self) -> bool:
        waited = self.state.epoch - self.state.best_epoch
        return self.state.epoch >= self.optim.epochs or 0 < self.optim.patience <= waited

    def _epoch(self) -> dict[str, float]:
        self.model.train()
        plan = epoch_groups(
            self.train_data.lengths, self.model.num_inputs, self.groups_per_step, self.optim.seed, self.state.epoch
        )
        share = self.groups_per_step // self.world
        torch.manual_seed(self.optim.seed * 100_003 + self.state.epoch * 1_009 + self.rank)  # dropout
        totals: dict[str, Tensor] = {}
        for groups in plan[:, self.rank * share : (self.rank + 1) * share]:  # (G, N) of this worker
            rows, inside = local_rows(groups)
            batch = self.train_data.batch(rows)
            warmup = self.state.step < self.model.method.warmup_steps
            losses = self.step(batch, inside.to(batch.labels.device), warmup)
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.state.step += 1
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach()
            if self.on_step is not None:
                self.on_step(self.state.step, self.total_steps, {"loss": float(losses["loss"].detach())})
        means = {f"train_{name}": float(mean_over_workers(total / len(plan))) for name, total in totals.items()}
        if not math.isfinite(means["train_loss"]):
            raise FloatingPointError(
                f"the training loss became {means['train_loss']} in epoch {self.state.epoch + 1}; "
                f"lower learning_rate (now {self.optim.learning_rate})"
            )
        return means

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that training moves, on the CPU, by name."""
        named = self.model.named_parameters()
        return {name: value.detach().cpu().clone() for name, value in named if value.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs: weights, optimiser, schedule and place."""
        return {
            "weights": self.trained_weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "state": asdict(self.state),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        load_weights(self.model, saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.state = TrainerState(**saved["state"])


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put back exactly the trained weights.

    Raises:
        UserError: a name is missing or unexpected.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())[:4]
        raise UserError(
            f"the checkpoint belongs to another model: {', '.join(odd)} in one of the two only; start a new run"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def worker() -> tuple[int, int]:
    """This process's rank and the number of workers; 0 and 1 outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_workers(value: Tensor) -> Tensor:
    """The mean of a scalar over all workers."""
    _, world = worker()
    if world > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world
    return value
