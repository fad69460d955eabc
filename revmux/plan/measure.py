"""From trained adapters to candidates of a plan: their answers on the choosing set, and their cost on this hardware."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from revmux.adapters.folder import load_adapter
from revmux.backbone.base import evaluating
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.estimate.flops import resume_cost
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.features.base import Features
from revmux.features.config import StoreConfig
from revmux.features.key import backbone_digest
from revmux.features.store import FeatureStore, open_features
from revmux.grouping import shuffled_groups
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.plan.choose import Candidate, Floats
from revmux.plan.config import MeasureConfig
from revmux.plan.fallback_curve import evaluate_fallback
from revmux.plan.front import front
from revmux.pretrained.pretrained import Pretrained
from revmux.training.evaluation import predict
from revmux.training.recipe import relative_cost_at


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


@dataclass(frozen=True)
class Answers:
    """The results of a model at one threshold.

    Attributes:
        threshold: confidence below which an answer falls back; 0 means no fallback.
        fallback: share of the answers that fell back.
        cost: counted operations per input relative to SISO, fallback included.
        correct: (M,) how often each input was answered correctly, 0..1.
    """

    threshold: float
    fallback: float
    cost: float
    correct: Floats = field(repr=False)


def log_nothing(message: str) -> None:
    """Discard a line of progress."""


@dataclass(frozen=True)
class Bench:
    """Measures candidates with one frozen model on one split.

    Args:
        pretrained: the task model, already on its device.
        split: the tokenized inputs.
        store: where features are stored.
        config: how candidates are measured.
        log: called with a line of progress before each part of the work.
    """

    pretrained: Pretrained
    split: TokenizedSplit
    store: StoreConfig
    config: MeasureConfig = field(default_factory=MeasureConfig)
    log: Callable[[str], None] = log_nothing

    def siso(self) -> Floats:
        """(M,) whether the plain model is correct on each input, 0 or 1."""
        features = self._open([]).with_tokens()
        teacher = [
            features.batch(rows).teacher_scores.argmax(-1).cpu()  # type: ignore[union-attr]
            for rows in torch.arange(len(self.split)).split(256)
        ]
        correct: Floats = (torch.cat(teacher) == self.split.labels).double().numpy()
        return correct

    def candidates(self, adapters: Sequence[TrainedAdapter]) -> list[Candidate]:
        """Each adapter without fallback and with each fallback threshold that it supports; costs are counted."""
        found: list[Candidate] = []
        for number, adapter in enumerate(adapters, 1):
            self.log(f"measuring the loss of {adapter.name} on the choosing set ({number} of {len(adapters)})")
            found += self._candidates_of(adapter)
        return found

    def _candidates_of(self, adapter: TrainedAdapter) -> list[Candidate]:
        model = load_adapter(adapter.folder, self.pretrained)
        made = []
        for point in answers(model, self._features(model), self.config):
            name = adapter.name if point.threshold == 0 else f"{adapter.name}@{point.threshold:g}"
            made.append(
                Candidate(
                    name=name,
                    method=model.method.name,
                    num_inputs=model.num_inputs,
                    prefill_layers=model.prefill_layers,
                    correct=point.correct,
                    cost_counted=point.cost,
                    options=model.method.options_dict(),
                    infonce_weight=adapter.infonce_weight,
                    threshold=point.threshold or None,
                    fallback=point.fallback,
                    folder=adapter.folder,
                    run_id=adapter.run_id,
                )
            )
        return made

    def answers(self, folder: str, threshold: float) -> Answers:
        """The results of the adapter in a folder at one fallback threshold; 0 means no fallback."""
        model = load_adapter(folder, self.pretrained)
        found = answers(model, self._features(model), replace(self.config, thresholds=(threshold,)))
        return next(answer for answer in found if answer.threshold == threshold)

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

    def measured(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates on the front of their width by counted cost, timed on this hardware in pairs with SISO.

        The other candidates are left out: another system of the same width costs no more and is no less accurate. The
        forward pass of an adapter is timed once. Each threshold then adds its share of answers that fall back, at
        counted cost.
        """
        widths = sorted({candidate.num_inputs for candidate in candidates})
        kept = [one for width in widths for one in front([other for other in candidates if other.num_inputs == width])]
        if not self.config.throughput_inputs:
            return kept
        backbone = self.pretrained.backbone
        plain = plain_classifier(backbone)
        batches = like_length_batches(
            self.split, self.config.throughput_inputs, self.config.throughput_batch, backbone.device
        )
        length = max(1, round(float(self.split.lengths.double().mean())))
        cost: dict[str, float] = {}
        folders = list(dict.fromkeys(one.folder for one in kept if one.folder is not None))
        for number, folder in enumerate(folders, 1):
            self.log(f"measuring the throughput of {Path(folder).name} on this hardware ({number} of {len(folders)})")
            model = load_adapter(folder, self.pretrained)
            cost[folder] = 1 / paired_throughput(plain, model, batches, self.config.throughput_pairs).median
        return [
            replace(
                one,
                throughput_ratio=1
                / (cost[one.folder] + one.fallback * resume_cost(backbone, one.prefill_layers, length)),
            )
            for one in kept
            if one.folder is not None
        ]


def answers(model: MultiplexedClassifier, features: Features, config: MeasureConfig) -> list[Answers]:
    """How often a model is correct on each input, at every threshold that it supports; the first is without fallback."""
    if reads_plain_states(model):
        thresholds = sorted({0.0, *config.thresholds})
        found = evaluate_fallback(model, features, thresholds, config.shuffles, config.seed)
        return [Answers(point.threshold, point.share, point.cost, point.correct.numpy()) for point in found]
    correct = torch.zeros(len(features), dtype=torch.float64)
    with evaluating(model):
        for shuffle in range(config.shuffles):
            groups = shuffled_groups(len(features), model.num_inputs, config.seed, shuffle)
            correct += predict(model, features, groups).labels == features.labels
    return [Answers(0.0, 0.0, relative_cost_at(model, features), (correct / config.shuffles).numpy())]


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
