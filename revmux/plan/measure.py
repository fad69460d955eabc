"""From trained adapters to candidates of a plan: their answers on the choosing set, and their cost on this hardware."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from revmux.adapters.folder import load_adapter
from revmux.backbone.base import evaluating
from revmux.data.split import hold_out
from revmux.data.tokens import SplitTokens
from revmux.errors import UserError
from revmux.estimate.flops import count_flops, plain_cost, resume_cost
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.fallback import confidence
from revmux.features.base import FeatureBatch, Features
from revmux.features.config import StoreConfig
from revmux.features.key import backbone_digest
from revmux.features.store import FeatureStore, open_features
from revmux.grouping import served_groups
from revmux.ladder import Ladder, Stage
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.config import MeasureConfig
from revmux.plan.interval import Floats
from revmux.plan.search import StageScores
from revmux.pretrained.pretrained import Pretrained
from revmux.training.evaluation import predict
from revmux.training.ladder_evaluation import evaluate_ladder


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter that may be served.

    Attributes:
        name: unique in its plan.
        folder: adapter folder.
        infonce_weight: λ of its training.
        run_id: MLflow run that trained it; None if there is none.
    """

    name: str
    folder: str
    infonce_weight: float = math.nan
    run_id: str | None = None


def divide(split: Dataset, search_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The two parts of a choosing set: the rows that help to find the front and the rows on which it is tested.

    A sentence and its phrases are in the same part, see :func:`revmux.data.split.hold_out`.

    Args:
        split: the choosing set.
        search_share: share of the rows in the first part.
        seed: random seed.

    Raises:
        UserError: the split has fewer than four rows.
    """
    if len(split) < 4:
        raise UserError(
            f"the choosing set has {len(split)} inputs, too few to be divided; choose a larger choosing.share"
        )
    numbered = split.add_column("row", list(range(len(split))))
    second, first = hold_out(numbered, max(1, round(search_share * len(split))), seed)
    return torch.tensor(sorted(first["row"])), torch.tensor(sorted(second["row"]))


def log_nothing(message: str) -> None:
    """Discard a line of progress."""


class FeatureRows:
    """Some rows of the features of a split.

    Args:
        features: of the whole split.
        rows: (R,) long.
    """

    def __init__(self, features: Features, rows: Tensor) -> None:
        self._features, self._rows = features, rows
        self.labels, self.lengths = features.labels[rows], features.lengths[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """The given rows of these rows."""
        return self._features.batch(self._rows[torch.as_tensor(rows)])


@dataclass(frozen=True)
class Bench:
    """Measures systems with one frozen model on one split.

    Args:
        pretrained: the task model, already on its device.
        split: the tokenized inputs.
        store: where features are stored.
        config: how systems are measured.
        log: called with a line of progress before each part of the work.
    """

    pretrained: Pretrained
    split: SplitTokens
    store: StoreConfig
    config: MeasureConfig = field(default_factory=MeasureConfig)
    log: Callable[[str], None] = log_nothing
    _models: dict[str, MultiplexedClassifier] = field(default_factory=dict, init=False, repr=False)
    _siso_rates: list[float] = field(default_factory=list, init=False, repr=False)

    @property
    def siso_rate(self) -> float | None:
        """Inputs per second of SISO: the median of all timings so far; None before the first."""
        return statistics.median(self._siso_rates) if self._siso_rates else None

    @cached_property
    def siso(self) -> Floats:
        """(M,) whether the plain model is correct on each input, 0 or 1."""
        correct: Floats = (self._plain == self.split.labels).double().numpy()
        return correct

    @cached_property
    def _plain(self) -> Tensor:
        """(M,) the classes that the plain model answers."""
        features = self._open([]).with_tokens()
        teacher = [
            features.batch(rows).teacher_scores.argmax(-1).cpu()  # type: ignore[union-attr]
            for rows in torch.arange(len(self.split)).split(256)
        ]
        return torch.cat(teacher)

    def scores(self, adapters: Sequence[TrainedAdapter], rows: Tensor | None = None) -> list[StageScores]:
        """The answers of every adapter to the given rows, all by default, with its counted cost."""
        rows = torch.arange(len(self.split)) if rows is None else rows
        found = []
        for number, adapter in enumerate(adapters, 1):
            self.log(f"measuring the loss of {adapter.name} on {len(rows):,} inputs ({number} of {len(adapters)})")
            found.append(self._scores_of(adapter, rows))
        return found

    def _scores_of(self, adapter: TrainedAdapter, rows: Tensor) -> StageScores:
        model = load_adapter(adapter.folder, self.pretrained)  # not kept: a sweep may have hundreds
        features = FeatureRows(self._features(model), rows)
        correct, sure, agrees, answers = [], [], [], []
        with evaluating(model):
            for shuffle in range(1 if model.num_inputs == 1 else self.config.shuffles):
                groups = served_groups(features.lengths, model.num_inputs, self.config.seed, shuffle)
                labels, _, scores = predict(model, features, groups)
                correct.append((labels == features.labels).numpy())
                sure.append(confidence(scores).numpy())
                agrees.append((labels == self._plain[rows]).numpy())
                answers.append(scores.numpy())
        length = max(1, round(float(self.split.lengths.double().mean())))
        cost = count_flops(model.backbone, model.method, model.prefill_layers, length)
        plain = plain_cost(model.backbone, length).per_input
        return StageScores(
            PlannedStage(
                adapter=adapter.name,
                method=model.method.name,
                num_inputs=model.num_inputs,
                prefill_layers=model.prefill_layers,
                options=model.method.options_dict(),
                infonce_weight=adapter.infonce_weight,
                folder=adapter.folder,
                run_id=adapter.run_id,
            ),
            np.stack(correct),
            np.stack(sure),
            cost.per_input / plain,
            cost.prefill / plain,
            resume_cost(model.backbone, model.prefill_layers, length),
            can_go_on=reads_plain_states(model),
            agrees=np.stack(agrees),
            scores=np.stack(answers),
            lengths=_state_lengths(features).numpy(),
        )

    def correct(self, system: Candidate, rows: Tensor | None = None) -> Floats:
        """Run a system as a server does, with groups of the inputs that reach each stage.

        Args:
            system: a single adapter or a ladder; not SISO.
            rows: (R,) rows of the split; None for all.

        Returns:
            (R,) how often each input was answered correctly, 0..1.
        """
        ladder = self._ladder(system)
        features = self._features(ladder.stages[0].model)
        if rows is not None:
            features = FeatureRows(features, rows)
        found = evaluate_ladder(ladder, features, self.config.shuffles, self.config.seed, grouping="length")
        correct: Floats = found.correct.numpy()
        return correct

    def timed(self, systems: Sequence[Candidate]) -> list[Candidate]:
        """The systems with their throughput on this hardware, timed in pairs with SISO, all stages included."""
        if not self.config.throughput_inputs:
            return list(systems)
        plain = plain_classifier(self.pretrained.backbone)
        batches = like_length_batches(
            self.split, self.config.throughput_inputs, self.config.throughput_batch, self.pretrained.backbone.device
        )
        found = []
        for number, system in enumerate(systems, 1):
            self.log(f"measuring the throughput of {system.name} on this hardware ({number} of {len(systems)})")
            ratio = paired_throughput(plain, self._ladder(system), batches, self.config.throughput_pairs)
            self._siso_rates.append(ratio.baseline_rate)
            found.append(replace(system, throughput_ratio=ratio.median))
        return found

    def _ladder(self, system: Candidate) -> Ladder:
        return Ladder(
            [Stage(self._model(stage.folder), stage.threshold or 0.0, stage.deferral) for stage in system.stages]
        )

    def _model(self, folder: str | None) -> MultiplexedClassifier:
        assert folder is not None
        if folder not in self._models:
            self._models[folder] = load_adapter(folder, self.pretrained)
        return self._models[folder]

    def _features(self, model: MultiplexedClassifier) -> Features:
        if reads_plain_states(model):
            layer = model.prefill_layers
            return self._open([layer]).at(layer)
        return self._open([]).with_tokens()

    def _open(self, layers: list[int]) -> FeatureStore:
        return open_features(self.pretrained, self.split, layers, self.store, weights=self._weights)

    @cached_property
    def _weights(self) -> str:
        return backbone_digest(self.pretrained.backbone)


def _state_lengths(features: FeatureRows) -> Tensor:
    """(M,) tokens per input as its states have them: a soft prompt adds some to each."""
    first = features.batch([0]).prefilled
    added = 0 if first is None else int(first.mask.sum()) - int(features.lengths[0])
    return features.lengths + added


def reads_plain_states(model: MultiplexedClassifier) -> bool:
    """Whether the prefilled states are the plain model's, so that they can be stored and answers can fall back.

    Raises:
        UserError: the method tunes the backbone, which a server shares with the plain model and other adapters.
    """
    if model.method.tunes_backbone:
        raise UserError(
            f"{model.method.name} tunes the backbone, which the plain model and other adapters share; plan with methods "
            "that keep it frozen"
        )
    return not model.method.prepares_tokens
