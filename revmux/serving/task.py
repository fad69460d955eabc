"""A named task: a frozen task model, and the line-up of adapters that requests may ride with at the moment."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from revmux.backbone import Backbone
from revmux.errors import UserError
from revmux.fallback import check_threshold
from revmux.model import MultiplexedClassifier
from revmux.pretrained.encoder import Encoder
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.adapters import LoadedAdapter, load_adapters
from revmux.serving.limits import Limits
from revmux.serving.scheduling import Route, admits, useful_routes


@dataclass(frozen=True)
class Lineup:
    """Adapters of one task at one time; a forward pass keeps the one that it was scheduled with.

    Attributes:
        adapters: loaded, narrowest first, one for each N.
        thresholds: by N, the confidence below which an answer falls back; N without one never does.
    """

    adapters: tuple[LoadedAdapter, ...]
    thresholds: dict[int, float]

    @cached_property
    def models(self) -> dict[int, MultiplexedClassifier]:
        """The adapters on the backbone, by N."""
        return {adapter.route.width: adapter.model for adapter in self.adapters}

    @cached_property
    def routes(self) -> list[Route]:
        """The ways that inputs may run, from the plain model to the cheapest."""
        return useful_routes([adapter.route for adapter in self.adapters])

    @property
    def widest(self) -> int:
        """The largest N that may run."""
        return self.routes[-1].width


class Task:
    """One task of an engine.

    Args:
        name: by which requests ask for it.
        pretrained: its frozen task model, on the device where it is to run.
        adapters: adapter folders trained on it, one for each N.
        limits: of the engine.
        max_length: tokens that an input may have; None is what all adapters were trained with.
        threshold: confidence below which an answer falls back to the plain model, for all adapters; None is each
            adapter's own, 0 switches it off.

    Attributes:
        lineup: what requests may ride with now.
        label_names: classes in the order of the scores.
        encoder: text to tokens.
        probe_tokens: of the text that asks for the model's health.
        padder: a tokenizer for the model's thread alone.

    Raises:
        UserError: an adapter that does not fit, two of one N, a threshold that an adapter cannot serve, or limits too
            small for one group.
    """

    def __init__(
        self,
        name: str,
        pretrained: Pretrained,
        adapters: Sequence[str | Path],
        limits: Limits,
        max_length: int | None = None,
        threshold: float | None = None,
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.backbone: Backbone = pretrained.backbone.freeze()
        self.label_names = self.backbone.label_names
        self.limits = limits
        self.threshold = threshold
        lineup = self._lineup(load_adapters(adapters, pretrained, limits.max_multiplex))
        if max_length is None:
            trained = [adapter.config.max_length for adapter in lineup.adapters]
            max_length = min([*trained, self._longest(lineup)])
        self.max_length = max_length
        self._check(lineup)
        self.lineup = lineup
        self.encoder = Encoder(pretrained, max_length, _pairs(lineup))
        self.probe_tokens = self.encoder.example.tokens
        self.padder = copy.deepcopy(pretrained.tokenizer)

    def load(self, folder: str | Path) -> LoadedAdapter:
        """Take an adapter into the line-up, in the place of the one with the same N.

        Groups that are in flight finish with the line-up that they were scheduled with.

        Raises:
            UserError: it does not fit the task model, the limits or the length that the task takes.
        """
        before = self.lineup.adapters
        self.lineup = self.lineup_with([folder])
        return next(adapter for adapter in self.lineup.adapters if adapter not in before)

    def lineup_with(self, load: Sequence[str | Path] = (), retire: Collection[int] = ()) -> Lineup:
        """The line-up with some adapters more, each in the place of the one with the same N, and without others.

        Nothing changes before it is put in the place of :attr:`lineup`.

        Args:
            load: adapter folders.
            retire: N of the adapters that go.

        Raises:
            UserError: an adapter does not fit the task model, the limits or the length that the task takes.
        """
        loaded = load_adapters(load, self.pretrained)
        most = self.limits.max_multiplex
        for adapter in loaded:
            if not admits(most, adapter.route.width):
                raise UserError(
                    f"adapter {adapter.folder!r} serves N = {adapter.route.width}, but max_multiplex is {most}; raise it"
                )
        gone = {adapter.route.width for adapter in loaded} | set(retire)
        kept = [adapter for adapter in self.lineup.adapters if adapter.route.width not in gone]
        lineup = self._lineup([*kept, *loaded])
        self._check(lineup)
        return lineup

    def retire(self, num_inputs: int) -> LoadedAdapter:
        """Take the adapter of an N out of the line-up; groups in flight finish with it.

        Raises:
            UserError: there is none of this N.
        """
        gone = [adapter for adapter in self.lineup.adapters if adapter.route.width == num_inputs]
        if not gone:
            known = ", ".join(str(width) for width in self.lineup.models) or "none"
            raise UserError(f"task {self.name!r} has no adapter of N = {num_inputs}; loaded: {known}")
        self.lineup = self._lineup([adapter for adapter in self.lineup.adapters if adapter not in gone])
        return gone[0]

    def _lineup(self, adapters: Sequence[LoadedAdapter]) -> Lineup:
        thresholds: dict[int, float] = {}
        for adapter in adapters:
            own = adapter.config.fallback_threshold if self.threshold is None else self.threshold
            check_threshold(own or 0.0, adapter.model.method, adapter.folder)
            if own:
                thresholds[adapter.route.width] = own
        return Lineup(tuple(sorted(adapters, key=lambda adapter: adapter.route.width)), thresholds)

    def _longest(self, lineup: Lineup) -> int:
        added = max((adapter.model.method.added_tokens for adapter in lineup.adapters), default=0)
        return self.backbone.max_length - added

    def _check(self, lineup: Lineup) -> None:
        most, length, limits = self._longest(lineup), self.max_length, self.limits
        if not 2 <= length <= most:
            raise UserError(
                f"max_length of task {self.name!r} is {length}; its backbone with these adapters takes 2..{most}"
            )
        if lineup.widest > limits.max_batch or lineup.widest * length > limits.max_batch_tokens:
            raise UserError(
                f"one group of {lineup.widest} inputs of {length} tokens exceeds max_batch ({limits.max_batch}) or "
                f"max_batch_tokens ({limits.max_batch_tokens}); raise these, or lower max_multiplex or max_length"
            )


def _pairs(lineup: Lineup) -> bool | None:
    """Whether adapters were trained on pairs of texts; None where none of them records it."""
    recorded = (adapter.config.task.get("pairs") for adapter in lineup.adapters)
    return next((pairs for pairs in recorded if isinstance(pairs, bool)), None)
