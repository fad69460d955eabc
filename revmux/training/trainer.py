"""The training loop: adapters on a frozen backbone, or a task model itself (SISO with the backbone unfrozen).

It runs on one process, or on every worker of a torch.distributed group that the caller has set up, and
knows nothing of who that is. Each epoch is yielded as a report, which the caller logs. Whatever a step
draws by chance follows from the seed, the step and the rank alone, so a run that goes on from a checkpoint
ends with the weights of one that was never stopped.
"""

from __future__ import annotations

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
from revmux.grouping import epoch_groups, local_rows
from revmux.model import MultiplexedClassifier
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.distributed import from_first, mean_over_workers, rank_and_world, together
from revmux.training.evaluation import evaluate
from revmux.training.losses import ContrastSet, gather_from_workers
from revmux.training.step import TrainStep


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
    """Where training stands, as a checkpoint keeps it.

    Attributes:
        epoch: epochs done.
        epoch_step: steps done of the epoch under way.
        step: steps done in all.
        best_accuracy: the best selection accuracy so far.
        best_epoch: whose it is, 1-based.
        history: the metrics of each epoch done.
        sums: losses added up over the steps of the epoch under way.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains what the method says is to be trained.

    Args:
        model: on its device already.
        train: the training split.
        selection: the split that chooses the checkpoint; never the one reported.
        optim: see :class:`OptimConfig`.
        loss: see :class:`revmux.training.config.LossConfig`.
        on_step: called on every worker after each step with (step, steps in all, metrics): ``loss``, a scalar tensor
            (to read it waits for the device), and ``tokens``, of the step over all workers.
        checkpoints: where rank 0 saves, at the end of each epoch; nothing is saved without.
        checkpoint_steps: steps between checkpoints within an epoch too; 0 saves none there.

    Attributes:
        best: the weights of the best epoch so far, on the CPU.

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
                f"{model.method.name} tunes a backbone that was loaded as {model.backbone.dtype}, where small steps are lost "
                "to rounding; load it as float32, and set precision bfloat16 to compute at half width"
            )
        self.train_step = TrainStep(model, loss, half_width=optim.precision == "bfloat16")
        self.step: nn.Module = self.train_step
        if self.world > 1:
            # A tuned backbone has parts that an adapter may pass by: its own head, layers above the exit.
            self.step = DistributedDataParallel(self.train_step, find_unused_parameters=model.method.tunes_prefill)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True
        )
        self.groups_per_step = optim.batch_size // model.num_inputs
        self.steps_per_epoch = -(-len(train) // (self.groups_per_step * model.num_inputs))
        self.total_steps = self.steps_per_epoch * optim.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.best = self.trained_weights()

    def _rate(self, step: int) -> float:
        warmup = math.ceil(self.optim.warmup_share * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))

    def resume(self) -> int:
        """Go on from the newest sound checkpoint; every worker calls this.

        Returns:
            The step to go on from; 0 where there is no checkpoint.

        Raises:
            UserError: all checkpoints are damaged, or they belong to another run.
        """
        if self.checkpoints is None:
            return 0
        with together():
            found = self.checkpoints.load() if self.rank == 0 else None
        step = from_first(None if found is None else found.step)
        if step is None:
            return 0
        with together():
            found = found or self.checkpoints.load_step(step)
            self.load_state_dict(found.state)
            self.best = found.best
        return self.state.step

    def run(self) -> Iterator[EpochReport]:
        """Train to the end, from wherever the state stands; one report an epoch, alike on every worker.

        Raises:
            UserError: the loss is no number any more, or a checkpoint cannot be written; on every worker.
        """
        while not self._is_finished():
            metrics = self._epoch()
            chosen = evaluate(self.model, self.selection, shuffles=1, seed=self.optim.seed)
            metrics |= {
                "selection_accuracy": chosen.accuracy_mean,
                "selection_agreement": chosen.siso_agreement,
                "learning_rate": float(self.scheduler.get_last_lr()[0]),
            }
            self.state.epoch += 1
            self.state.epoch_step, self.state.sums = 0, {}
            is_best = chosen.accuracy_mean > self.state.best_accuracy
            if is_best:
                self.state.best_accuracy, self.state.best_epoch = chosen.accuracy_mean, self.state.epoch
                self.best = self.trained_weights()
            self.state.history.append(metrics)
            self._save()
            yield EpochReport(self.state.epoch, self.state.step, metrics, is_best, self._is_finished())

    def _is_finished(self) -> bool:
        waited = self.state.epoch - self.state.best_epoch
        return self.state.epoch >= self.optim.epochs or 0 < self.optim.patience <= waited

    def _epoch(self) -> dict[str, float]:
        """The rest of the epoch under way; returns its mean losses, and the rates of the steps taken here."""
        self.model.train()
        state = self.state
        schedule = epoch_groups(
            self.train_data.lengths, self.model.num_inputs, self.groups_per_step, self.optim.seed, state.epoch
        )
        tokens = self.train_data.lengths[schedule].sum(dim=(1, 2)).tolist()  # of each step
        share = self.groups_per_step // self.world
        own = schedule[:, self.rank * share : (self.rank + 1) * share]  # (steps, G, N) of this worker
        totals: dict[str, Tensor] = {}
        first, started = state.epoch_step, time.perf_counter()
        for index in range(first, len(schedule)):
            losses = self._step(own[index], schedule[index])
            state.step += 1
            state.epoch_step += 1
            for name, value in losses.items():
                totals[name] = totals[name] + value if name in totals else value
            if self.on_step is not None:
                self.on_step(state.step, self.total_steps, {"loss": losses["loss"], "tokens": tokens[index]})
            is_last = state.epoch_step == len(schedule)
            if is_last or (self.checkpoint_steps and state.step % self.checkpoint_steps == 0):
                self._add_up(totals)
                totals = {}
                if not is_last:
                    self._save()
        seconds, steps = time.perf_counter() - started, len(schedule) - first
        means = {f"train_{name}": total / len(schedule) for name, total in state.sums.items()}
        return means | {
            "steps_per_second": steps / seconds,
            "inputs_per_second": steps * schedule[0].numel() / seconds,
            "tokens_per_second": sum(tokens[first:]) / seconds,
        }

    def _step(self, groups: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """One optimiser step over this worker's (G, N) groups of the ``whole`` (W·G, N); its mean losses, detached."""
        seeds = np.random.SeedSequence([self.optim.seed, self.state.step, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))  # dropout
        parts = []
        for part in groups.chunk(self.optim.accumulate):
            rows, inside = local_rows(part)
            batch = self.train_data.batch(rows)
            inside = inside.to(batch.labels.device)
            parts.append((batch, inside, self.train_step.teachers(batch, inside)))
        among = self._candidates([teachers for _, _, teachers in parts], whole)
        means: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for index, (batch, inside, teachers) in enumerate(parts):
            candidates = None if among is None else among._replace(first=among.first + index * inside.numel())
            warmup = self.state.step < self.model.method.warmup_steps
            is_last = index == len(parts) - 1
            with nullcontext() if is_last or self.world == 1 else self.step.no_sync():  # type: ignore[operator]
                losses = self.step(batch, inside, teachers, warmup, candidates)
                (losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                mean = value.detach() / len(parts)
                means[name] = means[name] + mean if name in means else mean
        nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)
        self.optimizer.step()
        self.scheduler.step()
        return means

    def _candidates(self, teachers: list[Tensor | None], whole: Tensor) -> ContrastSet | None:
        """The teachers of the whole step, (W·G, N), over all workers and parts; the first is this worker's own first."""
        matched = [teacher.flatten(0, 1) for teacher in teachers if teacher is not None]
        if not matched or not self.loss.infonce_weight or self.loss.negatives != "batch":
            return None
        vectors, first = gather_from_workers(torch.cat(matched))  # by rank, as the step is shared out
        return ContrastSet(vectors, first, whole.flatten().to(vectors.device))

    def _add_up(self, totals: dict[str, Tensor]) -> None:
        """Add losses of steps, a mean over workers, to those that the state has of the epoch.

        Raises:
            UserError: a sum is no number; on every worker, before anything is saved.
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
        with together():
            if self.rank == 0:
                self.checkpoints.save(self.state.step, self.state_dict(), self.best, self.state.best_epoch)

    def _place(self) -> dict[str, int]:
        """What decides which inputs a step has: a run goes on only where this is the same."""
        optim = self.optim
        return {
            "training examples": len(self.train_data),
            "num_inputs": self.model.num_inputs,
            "batch_size": optim.batch_size,
            "epochs": optim.epochs,
            "seed": optim.seed,
        }

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
            "place": self._place(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            UserError: it belongs to another model, or to a run with other steps.
        """
        for name, value in self._place().items():
            if saved["place"][name] != value:
                raise UserError(
                    f"the checkpoint has {name} {saved['place'][name]}, this run has {value}; start a new run"
                )
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
