"""Which of their lowest layers two task models have in common.

Two models have the same states after layer d if their architecture is the same and everything up to layer d reads the
same weights, which :mod:`revmux.serving.shared_weights` keeps as one tensor. The weights that a layer reads are
recorded while it runs, because a name does not tell where a weight is used: DeBERTa's layers, for example, read a norm
that belongs to none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from revmux.backbone import Backbone, TokenBatch
from revmux.serving.architecture import architecture_of


class LowerLayers:
    """What the states of plain inputs depend on, depth by depth.

    Args:
        backbone: frozen, with its shared weights.
        tokens: an input, each (1, S).
    """

    def __init__(self, backbone: Backbone, tokens: TokenBatch) -> None:
        self._architecture = architecture_of(backbone)
        self._weights: list[tuple[Tensor, ...]] = []  # those that the embedding, layer 1, layer 2, … read
        with torch.no_grad(), _Recorder(backbone) as recorder:
            state = backbone.embed(tokens)
            self._weights.append(recorder.take())
            for depth in range(1, backbone.num_layers + 1):
                state = backbone.run(state, depth)
                self._weights.append(recorder.take())

    def reads_only(self, known: Collection[int]) -> bool:
        """Whether all weights that are read belong to a set, by the identity of the tensors."""
        return all(id(tensor) in known for read in self._weights for tensor in read)

    def in_common(self, other: LowerLayers) -> int:
        """The number of lowest layers after which both models have the same states for every input."""
        if self._architecture != other._architecture:
            return 0
        depth = 0
        for depth, (own, others) in enumerate(zip(self._weights, other._weights)):
            if len(own) != len(others) or any(one is not two for one, two in zip(own, others)):
                return max(depth - 1, 0)
        return depth


class _Recorder(TorchFunctionMode):
    """Records the weights and buffers of a backbone that functions of PyTorch read in this thread."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._known = {id(tensor) for tensor in itertools.chain(backbone.parameters(), backbone.buffers())}
        self._found: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self._known:
                self._found[id(value)] = value
        return func(*args, **(kwargs or {}))

    def take(self) -> tuple[Tensor, ...]:
        """Return the weights that were read since the last call, in the order of their first use."""
        found, self._found = tuple(self._found.values()), {}
        return found
