"""LoRA above the cut: low-rank updates of the upper layers, for one method's passes only (Hu et al., 2021).

::

    y = W x + 2 · B (A x)                                # A: r × in, B: out × r, initialized to zero

The updates are applied in a copy of the backbone that shares all of its weights. The backbone itself has no hooks and
no replaced layers, so the plain model stays exact to the bit, several adapters can share it, and other threads may run
it at the same time. For inference, the updates can be merged into a second copy of the weights that they change, which
saves their operations and takes that much memory. PEFT replaces layers in the model itself and switches adapters globally, which allows none of this.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from revmux.backbone import Backbone

SCALE = 2.0
"""Factor of the update, alpha / r in the LoRA paper."""


class LowRankUpdate(nn.Module):
    """The factors A and B of one linear map, in float32.

    Args:
        inputs: width of the map's input.
        outputs: width of its output.
        rank: r.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, values: Tensor) -> Tensor:
        """The update of the map's output: (..., inputs) to (..., outputs)."""
        return SCALE * F.linear(F.linear(values.to(self.down.dtype), self.down), self.up).to(values.dtype)


class UpdatedLinear(nn.Module):
    """A frozen linear map plus its low-rank update. It shares the weights of both."""

    def __init__(self, base: nn.Module, update: LowRankUpdate) -> None:
        super().__init__()
        self.base = base
        self.update = update

    @property
    def weight(self) -> Any:
        """The frozen weight, whose type some families read."""
        return self.base.weight

    def forward(self, values: Tensor) -> Tensor:
        """Apply the map: (..., inputs) to (..., outputs)."""
        return self.base(values) + self.update(values)


class LoRA(nn.Module):
    """Low-rank updates of every linear map in some layers of a backbone.

    Args:
        backbone: the frozen backbone, of which only shapes and device are used.
        first: number of layers below the updated ones, l.
        last: the last updated layer, e.
        rank: r, at least 1.
    """

    def __init__(self, backbone: Backbone, first: int, last: int, rank: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    _key(name): LowRankUpdate(*_widths(linear), rank)
                    for name, linear in _linear_maps(backbone.layer(index))
                }
            )
            for index in range(first, last)
        )
        self.to(backbone.device)

    def applied_to(self, backbone: Backbone) -> Backbone:
        """A copy of a backbone that shares its weights, with the updates applied to layers ``first`` + 1 to ``last``."""
        updated = _sharing_copy(backbone)
        for layer, name, linear, update in self._maps(updated):
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, UpdatedLinear(linear, update))
        return updated

    @torch.no_grad()
    def merged_into(self, backbone: Backbone) -> Backbone:
        """A copy of a backbone for inference whose maps in layers ``first`` + 1 to ``last`` are W + 2 · B A.

        It shares all other weights. The sum is computed in float32 and has the type of W.
        """
        merged = _sharing_copy(backbone)
        for _, _, linear, update in self._maps(merged):
            change = SCALE * update.up @ update.down  # (out, in)
            change = change.T if isinstance(linear, Conv1D) else change
            weight: Tensor = linear.weight  # type: ignore[assignment]
            linear.weight = nn.Parameter((weight.float() + change).to(weight.dtype), requires_grad=False)
        return merged

    def merged_bytes(self, backbone: Backbone) -> int:
        """The memory that :meth:`merged_into` takes: the size of the maps that the updates change."""
        maps = (linear for index in range(self.first, self.last) for _, linear in _linear_maps(backbone.layer(index)))
        weights = [linear.weight for linear in maps]
        return sum(weight.numel() * weight.element_size() for weight in weights)  # type: ignore[operator, misc]

    def _maps(self, backbone: Backbone) -> Iterator[tuple[nn.Module, str, nn.Module, LowRankUpdate]]:
        """Every updated map of a backbone: its layer, its name there, the map and its update."""
        for index, updates in zip(range(self.first, self.last), self.layers, strict=True):
            assert isinstance(updates, nn.ModuleDict)
            layer = backbone.layer(index)
            for name, linear in list(_linear_maps(layer)):
                update = updates[_key(name)]
                assert isinstance(update, LowRankUpdate)
                yield layer, name, linear, update

    def is_applied_in(self, updated: Backbone, backbone: Backbone) -> bool:
        """Whether a copy from :meth:`applied_to` still uses the backbone's current tensors, which a functional call replaces."""
        name, own = next(_linear_maps(backbone.layer(self.first)))
        linear = updated.layer(self.first).get_submodule(name)
        assert isinstance(linear, UpdatedLinear)
        return linear.base.weight is own.weight


def _sharing_copy(backbone: Backbone) -> Backbone:
    """A copy of the modules of a backbone that shares all of its tensors."""
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in itertools.chain(backbone.parameters(), backbone.buffers())
    }
    return copy.deepcopy(backbone, shared)


def _linear_maps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D))


def _widths(linear: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear map."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _key(name: str) -> str:
    """The name of a submodule as a key of a module dictionary, which must not contain dots."""
    return name.replace(".", "-")
