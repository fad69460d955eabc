"""The trunk of a pass: the lowest layers, which run once for all tasks that take part in the pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.serving.forward import StepClock, pad


class Trunk:
    """The plain states of R inputs at the depths from which tasks go on.

    Args:
        inputs: the token lists of the inputs of all tasks. An object that several tasks answer is one of the R inputs.
        padder: a tokenizer of the tasks.
        depths: the depths.

    Attributes:
        is_usable: whether tasks may use it, see :meth:`drop`.
    """

    def __init__(
        self, inputs: Sequence[dict[str, list[int]]], padder: PreTrainedTokenizerBase, depths: Iterable[int]
    ) -> None:
        self._inputs = list({id(tokens): tokens for tokens in inputs}.values())
        self._rows = {id(tokens): row for row, tokens in enumerate(self._inputs)}
        self._answered: set[int] = set()
        self._clock: StepClock | None = None
        self._padder = padder
        self._depths = sorted(set(depths))
        self._tokens: TokenBatch | None = None
        self._states: dict[int, HiddenState] = {}
        self.is_usable = True

    @property
    def seconds(self) -> float:
        """Device time of the lower layers, once a task has its answers; 0 if they have not run."""
        return 0.0 if self._clock is None else sum(self._clock.seconds().values())

    def drop(self) -> None:
        """Release the states. The tasks that have not run yet compute their own."""
        self.is_usable = False
        self._states, self._tokens, self._clock = {}, None, None

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
            self._tokens = pad(self._inputs, self._padder)
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
            self._clock = clock
        state = self._states[depth]
        if list(rows) == self._everything:
            return state
        return state.take(torch.tensor(rows, device=backbone.device))

    @property
    def _everything(self) -> list[int]:
        return list(range(len(self._inputs)))
