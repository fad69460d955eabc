"""The trunk of a pass: the lowest layers, which run once for all tasks that take part in the pass.

Above it, tasks that differ from one base by low-rank updates alone run the remaining layers in one batch, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.backbone.low_rank import LowRankMap
from revmux.data.padding import Padder
from revmux.pretrained.shared_base import SharedBase
from revmux.serving.forward import StepClock


@dataclass(frozen=True)
class Branches:
    """The layers above the trunk for M inputs of tasks on one base, each with the updates of its own task.

    Attributes:
        base: the base.
        depth: the depth of the trunk where they begin.
        inputs: (M) the token lists, which are objects of the trunk.
        updates: (M) the updates of each input's task.
    """

    base: SharedBase
    depth: int
    inputs: Sequence[dict[str, list[int]]]
    updates: Sequence[Mapping[str, LowRankMap]]


class Trunk:
    """The plain states of R inputs at the depths from which tasks go on.

    Args:
        inputs: the token lists of the inputs of all tasks. An object that several tasks answer is one of the R inputs.
        padder: pads for the tasks.
        depths: the depths.
        branches: the layers above, if tasks run them in one batch.

    Attributes:
        is_usable: whether tasks may use it, see :meth:`drop`.
    """

    def __init__(
        self,
        inputs: Sequence[dict[str, list[int]]],
        padder: Padder,
        depths: Iterable[int],
        branches: Branches | None = None,
    ) -> None:
        self._inputs = list({id(tokens): tokens for tokens in inputs}.values())
        self._rows = {id(tokens): row for row, tokens in enumerate(self._inputs)}
        self._answered: set[int] = set()
        self._clocks: list[StepClock] = []
        self._branches = branches
        self._ends: HiddenState | None = None
        self._padder = padder
        self._depths = sorted(set(depths))
        self._tokens: TokenBatch | None = None
        self._states: dict[int, HiddenState] = {}
        self.is_usable = True

    @property
    def seconds(self) -> float:
        """Device time of what ran for several tasks, once a task has its answers; 0 if nothing has."""
        return sum(sum(clock.seconds().values()) for clock in self._clocks)

    def drop(self) -> None:
        """Release the states. The tasks that have not run yet compute their own."""
        self.is_usable = False
        self._states, self._tokens, self._ends, self._clocks = {}, None, None, []

    def answered(self, rows: Sequence[int]) -> int:
        """Note that a task has answered some rows, and return how many of them another task had answered before."""
        known = len(self._answered.intersection(rows))
        self._answered.update(rows)
        return known

    def rows(self, inputs: Sequence[dict[str, list[int]]]) -> list[int]:
        """The rows of some of the inputs, which are the same objects as those of the trunk."""
        return [self._rows[id(tokens)] for tokens in inputs]

    def tokens(self, rows: Sequence[int]) -> TokenBatch:
        """The tokens of some rows, padded to the longest of all R inputs: each (len(rows), S), on the CPU."""
        if self._tokens is None:
            self._tokens = self._padder.lists(self._inputs)
        return {name: tensor[list(rows)] for name, tensor in self._tokens.items()}

    def states(self, backbone: Backbone, rows: Sequence[int], depth: int) -> HiddenState:
        """The states of some rows at one of the depths.

        Args:
            backbone: the model that computes the states of all rows if this is the first call.
            rows: their order is that of the result.
            depth: one of the depths.
        """
        if not self._states:
            clock = StepClock(backbone.device)
            tokens = {name: tensor.to(backbone.device) for name, tensor in self.tokens(self._everything).items()}
            state = backbone.embed(tokens)  # (R, S, d)
            for reached in self._depths:
                state = backbone.run(state, reached)
                self._states[reached] = state
            clock.mark("prefill")
            self._clocks.append(clock)
        state = self._states[depth]
        if list(rows) == self._everything:
            return state
        return state.take(torch.tensor(rows, device=backbone.device))

    def ends(self, backbone: Backbone, first: int, count: int) -> HiddenState:
        """The states after the last layer of some inputs of the branches.

        Args:
            backbone: the model that computes the states of the trunk if this is the first call.
            first: number of the first one of the M inputs.
            count: number of inputs.
        """
        branches = self._branches
        assert branches is not None
        if self._ends is None:
            state = self.states(backbone, self.rows(branches.inputs), branches.depth)
            clock = StepClock(backbone.device)
            self._ends = branches.base.joint_layers.run(state, branches.updates)  # (M, S, d)
            clock.mark("upper")
            self._clocks.append(clock)
        return self._ends.map(lambda tensor: tensor[first : first + count])

    @property
    def _everything(self) -> list[int]:
        return list(range(len(self._inputs)))
