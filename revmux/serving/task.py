"""A named task: a frozen task model, and the line-up of adapters that requests currently use."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from revmux.adapters.config import load_adapter_config
from revmux.backbone import Backbone, TokenBatch
from revmux.backbone.joint_layers import fits_joint_layers, low_rank_maps
from revmux.backbone.low_rank import LowRankMap
from revmux.data.padding import Padder
from revmux.errors import UserError
from revmux.features.tokens import tokenizer_digest
from revmux.ladder import Stage, check_ladder
from revmux.pretrained.encoder import Encoder
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.adapters import LineupPlace, LoadedAdapter, admitted, check_stages, load_adapters
from revmux.serving.limits import Limits
from revmux.serving.lower_layers import LowerLayers
from revmux.serving.scheduling import PLAIN, Group, Route, admits, useful_routes
from revmux.serving.shared_weights import WeightPool


@dataclass(frozen=True)
class Lineup:
    """The adapters of one task at one time. A forward pass keeps the line-up that it was scheduled with.

    The number of waiting inputs decides which adapter of stage 1 answers an input. From there, an input of low
    confidence goes on through the later stages of the ladder to the plain model.

    Attributes:
        adapters: loaded adapters, stage by stage; those of stage 1 have different N, narrowest first.
    """

    adapters: tuple[LoadedAdapter, ...]

    @cached_property
    def first(self) -> dict[int, LoadedAdapter]:
        """The adapters of stage 1, by N."""
        return {adapter.route.width: adapter for adapter in self.adapters if adapter.config.stage == 1}

    @cached_property
    def later(self) -> list[LoadedAdapter]:
        """The adapters of the later stages, stage 2 first."""
        return [adapter for adapter in self.adapters if adapter.config.stage > 1]

    @cached_property
    def stages(self) -> dict[int, Stage]:
        """Stage 1 by N."""
        return {width: adapter.stage for width, adapter in self.first.items()}

    @cached_property
    def later_stages(self) -> list[Stage]:
        """The later stages, stage 2 first."""
        return [adapter.stage for adapter in self.later]

    @cached_property
    def routes(self) -> list[Route]:
        """The routes that inputs may use first, from the plain model to the one with the lowest cost per input."""
        return useful_routes([self.route(adapter) for adapter in self.first.values()])

    def route(self, adapter: LoadedAdapter) -> Route:
        """The route of an adapter, with the expected cost of the inputs that go on from it, if it was measured."""
        return replace(adapter.route, alone=adapter.route.alone + self._cost_of_going_on(adapter))

    def _cost_of_going_on(self, adapter: LoadedAdapter) -> float:
        """Expected cost per input of the stages after this one and of the plain model."""
        if not adapter.share_on:
            return 0.0
        after = next((other for other in self.later if other.config.stage == adapter.config.stage + 1), None)
        if after is None:
            return adapter.share_on * (1 - adapter.route.alone)
        step = after.route.per_input - adapter.route.alone  # the layers in between, and the share of a group
        return adapter.share_on * (step + self._cost_of_going_on(after))

    def pass_cost(
        self, groups: Sequence[Group], last: Sequence[int], fell_back: Sequence[bool], shared: float = 0.0
    ) -> float:
        """Counted cost of a pass, with all stages that its inputs reached. The unit is one input in the plain model.

        Args:
            groups: the groups of the first stage, or of the plain model.
            last: the last stage of each input, in the order of the groups' members.
            fell_back: whether each input resumed on the plain model.
            shared: cost of the layers that ran for another task, which counts them.
        """
        routes = [group.route if group.route == PLAIN else self.first[group.width].route for group in groups]
        cost = sum(route.group_cost(len(group.members)) for route, group in zip(routes, groups))
        starts = [route.alone for route, group in zip(routes, groups) for _ in group.members]
        for start, stage, resumed in zip(starts, last, fell_back):
            if resumed:
                cost += 1 - start
            elif stage > 1:
                cost += self.later[stage - 2].route.alone - start
        for adapter in self.later:
            inputs = sum(stage >= adapter.config.stage for stage in last)
            cost += -(-inputs // adapter.route.width) * adapter.route.shared
        return cost - shared

    def uses(self, adapter: LoadedAdapter) -> bool:
        """Whether inputs can reach an adapter of this line-up."""
        if adapter.config.stage == 1:
            return self.route(adapter) in self.routes
        return any(first.threshold and self.uses(first) for first in self.first.values())

    @property
    def widest(self) -> int:
        """The largest N that inputs may use."""
        return max(self.routes[-1].width, *(adapter.route.width for adapter in self.later), 1)


class Task:
    """One task of an engine.

    Args:
        name: name of the task in requests.
        pretrained: the frozen task model, on the device where it runs.
        adapters: adapter folders trained on this model: one for each N in stage 1, and one for each later stage.
        limits: limits of the engine.
        max_length: maximum number of tokens per input; None is the length that all adapters were trained with.
        threshold: confidence below which an input goes on to the next stage or to the plain model, for all adapters.
            None uses each adapter's own threshold, 0 makes all answers final.

    Attributes:
        lineup: the adapters that requests currently use.
        label_names: names of the classes, in the order of the scores.
        pairs: whether the inputs are pairs of texts; None accepts both.
        updates: if the layers are those of a shared base with low-rank updates alone, these by name. Otherwise None.

    Raises:
        UserError: an adapter does not fit, two adapters have the same N or stage, the stages do not form a ladder, an
            adapter does not support the threshold, or the limits are too small for one group.
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
        described = [(str(folder), load_adapter_config(folder)) for folder in adapters]
        check_stages(described, threshold)
        used = [folder for folder, _ in admitted(described, limits.max_multiplex)]
        lineup = self._lineup(load_adapters(used, pretrained, threshold, limits.merge_limit))
        if max_length is None:
            trained = [adapter.config.max_length for adapter in lineup.adapters]
            max_length = min([*trained, self._longest(lineup)])
        self.max_length = max_length
        self._check(lineup)
        self.lineup = lineup
        pairs = _pairs(lineup)
        self.pairs = pretrained.pairs if pairs is None else pairs
        self.updates: Mapping[str, LowRankMap] | None = None
        self._lower: LowerLayers | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """Converts texts to tokens. Tasks of an engine whose tokenizers and limits are equal have the same one."""
        return Encoder(self.pretrained, self.max_length, self.pairs)

    @cached_property
    def padder(self) -> Padder:
        """Pads the tokens."""
        return Padder(copy.deepcopy(self.pretrained.tokenizer))

    @property
    def probe_tokens(self) -> dict[str, list[int]]:
        """Tokens of the text for health checks."""
        return self.encoder.example.tokens

    def join(self, others: Sequence[Task], weights: WeightPool) -> None:
        """Share with other tasks of the engine what is equal: weights, the tokenizer, and the run of the lowest layers.

        Args:
            others: the other tasks, which have joined before.
            weights: the weights of the engine's tasks.

        Raises:
            UserError: the prompt alone is longer than the limit of the task.
        """
        weights.share(self.backbone)
        same = self._with_same_tokens(others)
        first = self if same is None else same
        self.encoder, self.padder = first.encoder, first.padder
        if self.pretrained.prompt is None:  # the states of a kept prefix depend on all layers
            tokens = self.padder.lists([self.probe_tokens])
            on_device = {name: tensor.to(self.backbone.device) for name, tensor in tokens.items()}
            self._lower = LowerLayers(self.backbone, on_device)
            self.updates = self._updates_of(self._lower, on_device)

    def _updates_of(self, lower: LowerLayers, tokens: TokenBatch) -> Mapping[str, LowRankMap] | None:
        if self.pretrained.base is None:
            return None
        base, maps = self.pretrained.base.model, low_rank_maps(self.backbone)
        own = (parameter for updated in maps.values() for parameter in updated.parameters())
        known = {id(tensor) for tensor in chain(base.parameters(), base.buffers(), own)}
        return maps if lower.reads_only(known) and fits_joint_layers(self.backbone, tokens) else None

    def _with_same_tokens(self, others: Sequence[Task]) -> Task | None:
        """A task that turns every text into the same tokens."""
        similar = [
            other
            for other in others
            if (other.max_length, other.pairs, other.pretrained.prompt)
            == (self.max_length, self.pairs, self.pretrained.prompt)
        ]
        loaded_once = (other for other in similar if other.pretrained.tokenizer is self.pretrained.tokenizer)
        equal = (other for other in similar if other._tokenizer_digest == self._tokenizer_digest)
        return next(loaded_once, None) or next(equal, None)

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.pretrained.tokenizer)

    def layers_in_common(self, other: Task) -> int:
        """The number of lowest layers that give every input the same states in both tasks."""
        return 0 if self._lower is None or other._lower is None else self._lower.in_common(other._lower)

    def has_base_of(self, other: Task) -> bool:
        """Whether inputs of both tasks can pass all layers in one batch, because only low-rank updates differ."""
        have_updates = self.updates is not None and other.updates is not None
        return have_updates and self.pretrained.base is other.pretrained.base

    def pads_like(self, other: Task) -> bool:
        """Whether texts of both tasks can be padded to one batch."""
        return self.padder is other.padder or self._tokenizer_digest == other._tokenizer_digest

    def load(self, folder: str | Path) -> LoadedAdapter:
        """Add an adapter to the line-up, or replace the one in its place: the one with the same N, or of its stage.

        Groups that are already running finish with the line-up that they were scheduled with.

        Raises:
            UserError: the adapter does not fit the task model, the limits, the task's maximum length or the ladder.
        """
        before = self.lineup.adapters
        self.lineup = self.lineup_with([folder])
        return next(adapter for adapter in self.lineup.adapters if adapter not in before)

    def lineup_with(self, load: Sequence[str | Path] = (), retire: Collection[LineupPlace] = ()) -> Lineup:
        """Build a line-up with some adapters added or replaced, and others removed.

        The result takes effect when the caller assigns it to :attr:`lineup`.

        Args:
            load: adapter folders.
            retire: places of the adapters to remove.

        Raises:
            UserError: an adapter does not fit the task model, the limits, the task's maximum length or the ladder.
        """
        loaded = load_adapters(load, self.pretrained, self.threshold, self.limits.merge_limit)
        limit = self.limits.max_multiplex
        for adapter in loaded:
            if not admits(limit, adapter.route.width):
                raise UserError(
                    f"adapter {adapter.folder!r} serves N = {adapter.route.width}, but max_multiplex is {limit}; "
                    "raise max_multiplex"
                )
        dropped = {adapter.place for adapter in loaded} | set(retire)
        kept = [adapter for adapter in self.lineup.adapters if adapter.place not in dropped]
        lineup = self._lineup([*kept, *loaded])
        self._check(lineup)
        return lineup

    def retire(self, num_inputs: int, stage: int = 1) -> LoadedAdapter:
        """Remove the adapter of a stage with this N. Groups that are already running finish with it.

        Raises:
            UserError: the stage has no adapter with this N, or a later stage needs it.
        """
        of_stage = [adapter for adapter in self.lineup.adapters if adapter.config.stage == stage]
        retired = next((adapter for adapter in of_stage if adapter.route.width == num_inputs), None)
        if retired is None:
            where = f" in stage {stage}" if stage > 1 else ""
            known = ", ".join(str(adapter.route.width) for adapter in of_stage) or "none"
            raise UserError(f"task {self.name!r} has no adapter of N = {num_inputs}{where}; loaded: {known}")
        self.lineup = self.lineup_with(retire=[retired.place])
        return retired

    def _lineup(self, adapters: Sequence[LoadedAdapter]) -> Lineup:
        check_stages([(adapter.folder, adapter.config) for adapter in adapters], self.threshold)
        lineup = Lineup(tuple(sorted(adapters, key=lambda adapter: (adapter.config.stage, adapter.route.width))))
        if lineup.later:
            check_ladder(lineup.later_stages)
        for adapter in lineup.first.values():
            if adapter.threshold:
                check_ladder([adapter.stage, *lineup.later_stages])
        return lineup

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
