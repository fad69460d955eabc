"""Models that share one frozen base: each adds low-rank updates to some of its linear maps, and has some weights of its own.

::

    y = W x + b + B (A x)                                # A: r × in, B: out × r, with the factor of the update

A model with updates has its own modules only on the way to what it changes. All others, and all of the base's weights, are
the same objects as in the base, so a model takes about as much memory as its updates. The updates are not merged into W,
which would take a copy of W.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LowRankFactors:
    """The factors of one update.

    Attributes:
        down: A, (r, in).
        up: B, (out, r), which contains the factor of the update.
    """

    down: Tensor
    up: Tensor


class LowRankMap(nn.Module):
    """A linear map of the base with an update. It is a map of the base's class, with the same weight and bias."""

    down: nn.Parameter
    up: nn.Parameter

    def _add(self, output: Tensor, values: Tensor) -> Tensor:
        """Add the update: (..., out), (..., in) to (..., out)."""
        return output + F.linear(F.linear(values.to(self.down.dtype), self.down), self.up).to(output.dtype)


class LowRankLinear(LowRankMap, nn.Linear):
    """A ``Linear`` with an update."""

    def __init__(self, base: nn.Linear, update: LowRankFactors) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        _take_weights(self, base, update)

    def forward(self, values: Tensor) -> Tensor:
        """Apply the map: (..., in) to (..., out)."""
        return self._add(super().forward(values), values)


class LowRankConv1D(LowRankMap, Conv1D):
    """A ``Conv1D`` of GPT-2, whose weight is transposed, with an update."""

    def __init__(self, base: Any, update: LowRankFactors) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = base.nf, base.nx
        _take_weights(self, base, update)

    def forward(self, values: Tensor) -> Tensor:
        """Apply the map: (..., in) to (..., out)."""
        output: Tensor = super().forward(values)  # type: ignore[no-untyped-call]  # unannotated in transformers
        return self._add(output, values)


def _take_weights(updated: Any, base: Any, update: LowRankFactors) -> None:
    updated.weight, updated.bias = base.weight, base.bias
    updated.down = nn.Parameter(update.down, requires_grad=False)
    updated.up = nn.Parameter(update.up, requires_grad=False)
    updated.train(base.training)


def can_update(module: nn.Module, update: LowRankFactors) -> bool:
    """Whether a module is a linear map of the shape of an update."""
    if type(module) is nn.Linear:
        shape = (module.in_features, module.out_features)
    elif type(module) is Conv1D:
        shape = (module.nx, module.nf)
    else:
        return False
    return shape == (update.down.shape[1], update.up.shape[0])


def updated_model(
    base: nn.Module, config: Any, updates: Mapping[str, LowRankFactors], weights: Mapping[str, Tensor]
) -> Any:
    """A model of Transformers that shares what it can with its base.

    Args:
        base: frozen. It remains unchanged.
        config: the configuration of the new model.
        updates: by the name of the linear map, which must fit, see :func:`can_update`.
        weights: the new model's own weights, by the name of the base's parameter that they replace.
    """
    model = sharing_copy(base, config, [*updates, *weights])
    for name, update in updates.items():
        linear = model.get_submodule(name)
        made = LowRankConv1D(linear, update) if isinstance(linear, Conv1D) else LowRankLinear(linear, update)
        model.set_submodule(name, made)
    for name, tensor in weights.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        if isinstance(owner, nn.Linear):
            owner.out_features = len(tensor)
    if hasattr(model, "num_labels"):
        model.num_labels = config.num_labels
    return model


def sharing_copy(base: nn.Module, config: Any, replaced: Iterable[str]) -> Any:
    """A copy of a model in which modules and parameters can be replaced.

    All of its tensors, and the modules that contain nothing that is replaced, are the base's own.

    Args:
        base: a model of Transformers.
        config: the configuration of the copy.
        replaced: names of the modules and parameters that will be replaced.
    """
    own = {""}
    for name in replaced:
        parts = name.split(".")
        own |= {".".join(parts[:length]) for length in range(1, len(parts))}
    shared: dict[int, Any] = {id(base.config): config}
    for name, module in base.named_modules():
        if name not in own:
            shared[id(module)] = module
        elif (inner := module.__dict__.get("config")) is not None:
            shared.setdefault(id(inner), inner)
    shared |= {id(tensor): tensor for tensor in itertools.chain(base.parameters(), base.buffers())}
    return copy.deepcopy(base, shared)
