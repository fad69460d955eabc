"""A named task: a frozen task model, and the line-up of adapters that requests currently use."""

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
    """The adapters of one task at one time. A forward pass keeps the line-up that it was scheduled with.

    Attributes:
        adapters: loaded adapters, one for each N, narrowest first.
        thresholds: confidence by N below which an answer falls back. Answers of an N without an entry never do.
    """

    adapters: tuple[LoadedAdapter, ...]
    thresholds: dict[int, float]

    @cached_property
    def models(self) -> dict[int, MultiplexedClassifier]:
        """The backbone with each adapter, by N."""
        return {adapter.route.width: adapter.model for adapter in self.adapters}

    @cached_property
    def routes(self) -> list[Route]:
        """The routes that inputs may use, from the plain model to the one with the lowest cost per input."""
        return useful_routes([adapter.route for adapter in self.adapters])

    @property
    def widest(self) -> int:
        """The largest N that inputs may use."""
        return self.routes[-1].width


class Task:
    """One task of an engine.

    Args:
        name: name of the task in requests.
        pretrained: the frozen task model, on the device where it runs.
        adapters: adapter folders trained on this model, one for each N.
        limits: limits of the engine.
        max_length: maximum number of tokens per input; None is the length that all adapters were trained with.
        threshold: confidence below which an answer falls back to the plain model, for all adapters. None uses each
            adapter's own threshold, 0 disables the fallback.

    Attributes:
        lineup: the adapters that requests currently use.
        label_names: names of the classes, in the order of the scores.
        encoder: converts texts to tokens.
        probe_tokens: tokens of the text for health checks.
        padder: a tokenizer for use by the model's thread only.

    Raises:
        UserError: an adapter does not fit, two adapters have the same N, an adapter does not support the threshold, or
            the limits are too small for one group.
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
        """Add an adapter to the line-up, or replace the one with the same N.

        Groups that are already running finish with the line-up that they were scheduled with.

        Raises:
            UserError: the adapter does not fit the task model, the limits or the task's maximum length.
        """
        before = self.lineup.adapters
        self.lineup = self.lineup_with([folder])
        return next(adapter for adapter in self.lineup.adapters if adapter not in before)

    def lineup_with(self, load: Sequence[str | Path] = (), retire: Collection[int] = ()) -> Lineup:
        """Build a line-up with some adapters added or replaced by N, and others removed.

        The result takes effect when the caller assigns it to :attr:`lineup`.

        Args:
            load: adapter folders.
            retire: N of the adapters to remove.

        Raises:
            UserError: an adapter does not fit the task model, the limits or the task's maximum length.
        """
        loaded = load_adapters(load, self.pretrained)
        limit = self.limits.max_multiplex
        for adapter in loaded:
            if not admits(limit, adapter.route.width):
                raise UserError(
                    f"adapter {adapter.folder!r} serves N = {adapter.route.width}, but max_multiplex is {limit}; "
                    "raise max_multiplex"
                )
        dropped = {adapter.route.width for adapter in loaded} | set(retire)
        kept = [adapter for adapter in self.lineup.adapters if adapter.route.width not in dropped]
        lineup = self._lineup([*kept, *loaded])
        self._check(lineup)
        return lineup

    def retire(self, num_inputs: int) -> LoadedAdapter:
        """Remove the adapter with this N from the line-up. Groups that are already running finish with it.

        Raises:
            UserError: there is no adapter with this N.
        """
        retired = [adapter for adapter in self.lineup.adapters if adapter.route.width == num_inputs]
        if not retired:
            known = ", ".join(str(width) for width in self.lineup.models) or "none"
            raise UserError(f"task {self.name!r} has no adapter of N = {num_inputs}; loaded: {known}")
        self.lineup = self._lineup([adapter for adapter in self.lineup.adapters if adapter not in retired])
        return retired[0]

    def _lineup(self, adapters: Sequence[LoadedAdapter]) -> Lineup:
        thresholds: dict[int, float] = {}
        for adapter in adapters:
            threshold = adapter.config.fallback_threshold if self.threshold is None else self.threshold
            check_threshold(threshold or 0.0, adapter.model.method, adapter.folder)
            if threshold:
                thresholds[adapter.route.width] = threshold
        return Lineup(tuple(sorted(adapters, key=lambda adapter: adapter.route.width)), thresholds)

    def _longest(self, lineup: Lineup) -> int:
        added = max((adapter.model.method.added_tokens for adapter in lineup.adapters), default=0)
        return self.backbone.max_length - added

    def _check(self, lineup: Lineup) -> None:
        longest, length, limits = self._longest(lineup), self.max_length, self.limits
        if not 2 <= length <= longest:
            raise UserError(
                f"max_length of task {self.name!r} is {length}; its backbone and adapters allow 2..{longest}"
            )
        if lineup.widest > limits.max_batch or lineup.widest * length > limits.max_batch_tokens:
            raise UserError(
                f"one group of {lineup.widest} inputs of {length} tokens exceeds max_batch ({limits.max_batch}) or "
                f"max_batch_tokens ({limits.max_batch_tokens}); raise that limit, or lower max_multiplex or max_length"
            )


def _pairs(lineup: Lineup) -> bool | None:
    """Whether the adapters were trained on pairs of texts; None if no adapter records it."""
    return next((adapter.config.pairs for adapter in lineup.adapters if adapter.config.pairs is not None), None)
