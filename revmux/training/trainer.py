"""The training loop: adapters on a frozen backbone, or a task model itself (SISO with the backbone unfrozen).

It runs in one process, or on every worker of a torch.distributed group that the caller has set up. The loop yields a
report per epoch, which the caller logs. The random numbers of a step depend only on the seed, the step and the rank,
so a run that resumes from a checkpoint ends with the same weights as an uninterrupted run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revmux.errors import UserError
from revmux.features.base import Features
from revmux.grouping import EpochSchedule, local_rows
from revmux.model import MultiplexedClassifier
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.distributed import (
    copy_from_first,
    fail_together,
    from_first,
    mean_over_workers,
    rank_and_world,
    shares,
)
from revmux.training.evaluation import evaluate
from revmux.training.losses import ContrastSet, gather_from_workers
from revmux.training.step import TrainStep

_log = logging.getLogger(__name__)
LEARNED_SHARE = 0.1
"""A run has collapsed if its selection accuracy exceeds the majority class's share by less than this share of what the
plain model's does."""
FEWEST_TO_JUDGE = 50
"""Selection examples below which chance decides whether a run seems to have collapsed."""
RESTART_RATE = 0.3
"""Factor of the learning rate when a collapsed run restarts."""


@dataclass(frozen=True)
class EpochReport:
    """The outcome of one epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        step: optimizer steps so far.
        metrics: mean training losses, selection accuracy and agreement, learning rate, and steps, inputs and tokens
            per second.
        is_best: whether the selection accuracy is the best so far.
        stop: whether training ends after this epoch.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    is_best: bool
    stop: bool


@dataclass
class TrainerState:
    """The progress of a run, as stored in a checkpoint.

    Attributes:
        epoch: completed epochs.
        epoch_step: completed steps of the current epoch.
        step: completed steps in total.
        best_accuracy: the best selection accuracy so far.
        best_epoch: the epoch that reached it, from 1.
        history: the metrics of each completed epoch.
        restarts: 1 if the run collapsed and was restarted, otherwise 0.
        restarted_after: number of epochs completed before the restart.
        sums: losses summed over the completed steps of the current epoch.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    restarts: int = 0
    restarted_after: int = 0
    sums: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains the parameters that require gradients: the method's, or a task model's.

    A run with a frozen backbone that ends (almost) on one class is restarted once, with the initial weights and a lower
    learning rate. If it collapses again, it ends with a warning, and ``collapsed`` is true.

    Args:
        model: already on its device.
        train: features of the training split.
        selection: features of the split that selects the best epoch; never the split that is reported.
        optim: see :class:`OptimConfig`.
        loss: see :class:`revmux.training.config.LossConfig`.
        on_step: called on every worker after each step with the step, the total number of steps, and metrics of the
            step: ``loss``, this worker's part as a scalar tensor (the mean over the workers is that of the step; reading
            its value waits for the device), and ``tokens``, their number over all workers.
        checkpoints: where rank 0 saves a checkpoint at the end of each epoch; None saves none.
        checkpoint_steps: steps between additional checkpoints within an epoch; 0 saves only at the end.

    Attributes:
        best: the weights of the best epoch so far, on the CPU.

    Raises:
        UserError: the batch cannot be divided into groups, or the model has no weights to train.
    """

    def __init__(
        self,
        model: MultiplexedClassifier,
        train: Features,
        selection: Features,
        optim: OptimConfig,
        loss: LossConfig,
        on_step: Callable[[int, int, dict[str, Any]], None] | None = None,
        checkpoints: CheckpointFolder | None = None,
        checkpoint_steps: int = 0,
    ) -> None:
        self.rank, self.world = rank_and_world()
        optim.check_groups(model.num_inputs, self.world)
        self.model, self.train_data, self.selection = model, train, selection
        self.optim, self.loss, self.on_step = optim, loss, on_step
        self.checkpoints, self.checkpoint_steps = checkpoints, checkpoint_steps
        self.state = TrainerState()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise UserError(
                f"{model.method.name} has no weights to train on a frozen backbone; choose another method, or set its "
                "option tune_backbone"
            )
        if any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise UserError(
                f"{model.method.name} tunes a backbone that was loaded as {model.backbone.dtype}, in which small updates are "
                "lost to rounding; load it as float32, and set precision to bfloat16 to compute in half precision"
            )
        self.train_step = TrainStep(model, loss, half_width=optim.precision == "bfloat16")
        self.step: nn.Module = self.train_step
        if self.world > 1:
            # Each worker has loaded the frozen weights, which may be gigabytes, itself.
            copy_from_first(self.parameters)
            # A tuned backbone has parameters that a method may not use: its own head, layers above the exit.
            self.step = DistributedDataParallel(
                self.train_step, init_sync=False, find_unused_parameters=model.method.tunes_prefill
            )
        self.groups_per_step = optim.batch_size // model.num_inputs
        self.shares = shares(self.groups_per_step, self.world)
        self.steps_per_epoch = -(-len(train) // (self.groups_per_step * model.num_inputs))
        self.steps_per_start = self.steps_per_epoch * optim.epochs
        self.optimizer, self.scheduler = self._optimizer()
        self.best = self.trained_weights()
        self._initial = None if model.method.tunes_backbone else self.best
        self._majority = float(torch.bincount(selection.labels).max()) / len(selection)

    def _optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """A new optimizer and its schedule, at the learning rates of the current start."""
        optim, factor = self.optim, RESTART_RATE**self.state.restarts
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                is_tuned = name.startswith("backbone.") and optim.backbone_learning_rate is not None
                rate = optim.backbone_learning_rate if is_tuned else optim.learning_rate
                groups.setdefault(factor * float(rate or 0.0), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
            weight_decay=optim.weight_decay,
            fused=True,
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, including those before a restart."""
        return self.steps_per_epoch * self.state.restarted_after + self.steps_per_start

    @property
    def _steps_since_start(self) -> int:
        """Completed steps since the run started or restarted."""
        return self.state.step - self.steps_per_epoch * self.state.restarted_after

    def _rate(self, step: int) -> float:
        total = self.steps_per_start
        warmup = math.ceil(self.optim.warmup_share * total)
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (total - step) / max(1, total - warmup))

    def resume(self) -> int:
        """Resume from the newest undamaged checkpoint; every worker must call this.

        Returns:
            The step from which training resumes; 0 if there is no checkpoint.

        Raises:
            UserError: all checkpoints are damaged, or they belong to another run.
        """
        if self.checkpoints is None:
            return 0
        with fail_together():
            found = self.checkpoints.load() if self.rank == 0 else None
        step = from_first(None if found is None else found.step)
        if step is None:
            return 0
        with fail_together():
            found = found or self.checkpoints.load_step(step)
            self.load_state_dict(found.state)
            self.best = found.best
        return self.state.step

    def run(self) -> Iterator[EpochReport]:
        """Train from the current state to the end; yields one report per epoch, the same on every worker.

        Raises:
            UserError: the loss is not finite, or a checkpoint cannot be written; raised on every worker.
        """
        while not self._is_finished():
            metrics = self._epoch()
            chosen = evaluate(self.model, self.selection, shuffles=1, seed=self.optim.seed)
            metrics |= {
                "selection_accuracy": chosen.accuracy_mean,
                "selection_agreement": chosen.siso_agreement,
                "selection_siso_accuracy": chosen.siso_accuracy,
                "learning_rate": float(self.scheduler.get_last_lr()[0]),
            }
            self.state.epoch += 1
            self.state.epoch_step, self.state.sums = 0, {}
            is_best = chosen.accuracy_mean > self.state.best_accuracy
            if is_best:
                self.state.best_accuracy, self.state.best_epoch = chosen.accuracy_mean, self.state.epoch
                self.best = self.trained_weights()
            self.state.history.append(metrics)
            if self._is_finished() and self.collapsed:
                self._end_collapsed_run()
            metrics["restarts"] = float(self.state.restarts)
            self._save()
            yield EpochReport(self.state.epoch, self.state.step, metrics, is_best, self._is_finished())

    def _is_finished(self) -> bool:
        first = self.state.restarted_after
        waited = self.state.epoch - max(self.state.best_epoch, first)
        return self.state.epoch - first >= self.optim.epochs or 0 < self.optim.patience <= waited

    @property
    def collapsed(self) -> bool:
        """Whether the best selection accuracy so far is (almost) that of always answering the most common class."""
        if self._initial is None or len(self.selection) < FEWEST_TO_JUDGE:
            return False
        plain = [metrics["selection_siso_accuracy"] for metrics in self.state.history]
        known = plain[-1] if plain and not math.isnan(plain[-1]) else 1.0
        if known <= self._majority:  # the task model itself knows nothing that could be learned from it
            return False
        return self.state.best_accuracy < self._majority + LEARNED_SHARE * (known - self._majority)

    def _end_collapsed_run(self) -> None:
        """Restart a collapsed run once, otherwise report it."""
        found = (
            f"the run of {self.model.method.name} with N = {self.model.num_inputs} learned almost nothing: its best selection "
            f"accuracy is {self.state.best_accuracy:.1%}, and the most common class has a share of {self._majority:.1%}"
        )
        if self.state.restarts:
            if self.rank == 0:
                _log.warning("%s; choose a smaller N, more prefill layers, more epochs or more data", found)
            return
        self.state.restarts, self.state.restarted_after = 1, self.state.epoch
        rate = RESTART_RATE * self.optim.learning_rate
        if self.rank == 0:
            _log.warning("%s; restarting it once with learning_rate %g", found, rate)
        assert self._initial is not None
        load_weights(self.model, self._initial)
        self.optimizer, self.scheduler = self._optimizer()

    def _epoch(self) -> dict[str, float]:
        """Run the rest of the current epoch; returns its mean losses, and rates over the steps run by this call."""
        self.model.train()
        state = self.state
        lengths = self.train_data.lengths
        schedule = EpochSchedule(lengths, self.model.num_inputs, self.groups_per_step, self.optim.seed, state.epoch)
        totals: dict[str, Tensor] = {}
        first, tokens, started = state.epoch_step, 0, time.perf_counter()
        for groups in schedule.steps(first):  # (W·G, N)
            losses = self._step(groups.split(self.shares)[self.rank], groups)
            read = int(lengths[groups].sum())
            tokens += read
            state.step += 1
            state.epoch_step += 1
            for name, value in losses.items():
                totals[name] = totals[name] + value if name in totals else value
            if self.on_step is not None:
                self.on_step(state.step, self.total_steps, {"loss": losses["loss"], "tokens": read})
            is_last = state.epoch_step == len(schedule)
            if is_last or (self.checkpoint_steps and state.step % self.checkpoint_steps == 0):
                self._add_to_sums(totals)
                totals = {}
                if not is_last:
                    self._save()
        seconds, steps = time.perf_counter() - started, len(schedule) - first
        means = {f"train_{name}": total / len(schedule) for name, total in state.sums.items()}
        return means | {
            "steps_per_second": steps / seconds,
            "inputs_per_second": steps * self.groups_per_step * self.model.num_inputs / seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _step(self, groups: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """Run one optimizer step; returns this worker's losses, detached: their mean over the workers is that of the step.

        Args:
            groups: (G, N) long, this worker's groups.
            whole: (W·G, N) long, the groups of all workers.
        """
        seeds = np.random.SeedSequence([self.optim.seed, self.state.step, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))  # for dropout
        parts = []
        for part in groups.chunk(self.optim.accumulate):
            rows, inside = local_rows(part)
            batch = self.train_data.batch(rows)
            inside = inside.to(batch.labels.device)
            parts.append((batch, inside, self.train_step.teachers(batch, inside)))
        contrast = self._contrast_set([teachers for _, _, teachers in parts], whole)
        means: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        before = 0  # inputs of the parts so far
        for index, (batch, inside, teachers) in enumerate(parts):
            candidates = None if contrast is None else contrast._replace(first=contrast.first + before)
            before += inside.numel()
            # Gradients are averaged over the workers, which may have different numbers of groups.
            weight = len(inside) * self.world / len(whole)
            warmup = self._steps_since_start < self.model.method.warmup_steps
            is_last = index == len(parts) - 1
            with nullcontext() if is_last or self.world == 1 else self.step.no_sync():  # type: ignore[operator]
                losses = self.step(batch, inside, teachers, warmup, candidates)
                (losses["loss"] * weight).backward()
            for name, value in losses.items():
                mean = value.detach() * weight
                means[name] = means[name] + mean if name in means else mean
        nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)
        self.optimizer.step()
        self.scheduler.step()
        return means

    def _contrast_set(self, teachers: list[Tensor | None], whole: Tensor) -> ContrastSet | None:
        """The teacher vectors of the whole step, over all workers and micro-batches; None if InfoNCE needs none.

        Args:
            teachers: (G, N, r) per micro-batch of this worker, or None.
            whole: (W·G, N) long, the groups of all workers.
        """
        matched = [teacher.flatten(0, 1) for teacher in teachers if teacher is not None]
        if not matched or not self.loss.infonce_weight or self.loss.negatives != "batch":
            return None
        counts = [share * self.model.num_inputs for share in self.shares]
        vectors, first = gather_from_workers(torch.cat(matched), counts)  # ordered by rank, like ``whole``
        return ContrastSet(vectors, first, whole.flatten().to(vectors.device))

    def _add_to_sums(self, totals: dict[str, Tensor]) -> None:
        """Add summed losses, averaged over the workers, to the sums of the current epoch.

        Raises:
            UserError: the sum of the loss is not finite; raised on every worker, before anything is saved.
        """
        means = mean_over_workers(torch.stack(list(totals.values()))).tolist()
        for name, value in zip(totals, means):
            self.state.sums[name] = self.state.sums.get(name, 0.0) + value
        if not math.isfinite(self.state.sums["loss"]):
            raise UserError(
                f"the training loss became {self.state.sums['loss']} in epoch {self.state.epoch + 1}; "
                f"lower learning_rate (now {self.optim.learning_rate})"
            )

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        with fail_together():
            if self.rank == 0:
                self.checkpoints.save(self.state.step, self.state_dict(), self.best, self.state.best_epoch)

    def _place(self) -> dict[str, int]:
        """The settings that determine the inputs of each step; a run can resume only if they are unchanged."""
        optim = self.optim
        return {
            "training examples": len(self.train_data),
            "num_inputs": self.model.num_inputs,
            "batch_size": optim.batch_size,
            "epochs": optim.epochs,
            "seed": optim.seed,
        }

    def trained_weights(self) -> dict[str, Tensor]:
        """A copy of the weights that are trained, on the CPU, by name."""
        named = self.model.named_parameters()
        return {name: value.detach().cpu().clone() for name, value in named if value.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume: weights, optimizer, schedule, progress, and the settings that must not change."""
        return {
            "weights": self.trained_weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "state": asdict(self.state),
            "place": self._place(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            UserError: the state belongs to another model, or to a run with other settings.
        """
        for name, value in self._place().items():
            if saved["place"][name] != value:
                raise UserError(
                    f"the checkpoint has {name} {saved['place'][name]}, but this run has {value}; start a new run"
                )
        load_weights(self.model, saved["weights"])
        self.state = TrainerState(**saved["state"])
        self.optimizer, self.scheduler = self._optimizer()
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load trained weights into a model.

    Raises:
        UserError: a name is missing or unexpected.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != weights.keys():
        different = sorted(own.keys() ^ weights.keys())[:4]
        raise UserError(
            "the checkpoint belongs to another model: only one of the two has the weights "
            f"{', '.join(different)}; start a new run"
        )

    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
