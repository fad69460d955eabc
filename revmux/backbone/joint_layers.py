"""One batch through the layers of several models on one base, in which each input has the updates of its own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from revmux.backbone.base import Backbone
from revmux.backbone.low_rank import LowRankMap, sharing_copy
from revmux.backbone.registry import cut
from revmux.backbone.state import HiddenState, TokenBatch


class JointLayers:
    """The layers of a base. One thread at a time may run them.

    The updates of the inputs are stacked for each batch, so the base's linear maps run once for all inputs (Sheng et al.,
    2023, S-LoRA).

    Args:
        base: the frozen base model. It shares its weights.
    """

    def __init__(self, base: nn.Module) -> None:
        plain = cut(base)
        layers = {id(module) for index in range(plain.num_layers) for module in plain.layer(index).modules()}
        names = [
            name
            for name, module in base.named_modules()
            if id(module) in layers and isinstance(module, nn.Linear | Conv1D)
        ]
        model = sharing_copy(base, base.config, names)
        self._maps = {name: _JointMap(model.get_submodule(name)) for name in names}
        for name, made in self._maps.items():
            model.set_submodule(name, made)
        self._backbone = cut(model)

    def run(self, state: HiddenState, updates: Sequence[Mapping[str, LowRankMap]]) -> HiddenState:
        """All layers above a state.

        Args:
            state: R inputs at any depth, (R, S, d).
            updates: (R) the linear maps with updates of the model of each input, by name, see :func:`low_rank_maps`.

        Returns:
            The states after the last layer, (R, S, d).
        """
        try:
            for name, joint in self._maps.items():
                joint.update = _stacked([maps.get(name) for maps in updates])
            return self._backbone.run(state, self._backbone.num_layers)
        finally:
            for joint in self._maps.values():
                joint.update = None


def fits_joint_layers(backbone: Backbone, tokens: TokenBatch) -> bool:
    """Whether a model's inputs can pass :class:`JointLayers`: its updates change layers alone, and read states of inputs alone.

    DeBERTa's layers also apply their linear maps to relative positions, which belong to no input. ELECTRA's embedding may
    contain a linear map.

    Args:
        backbone: a model with low-rank updates.
        tokens: an input, each (1, S).
    """
    pair = {name: tensor.repeat(2, 1) for name, tensor in tokens.items()}
    rows: list[int] = []  # of the values that each map read
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
        for module in low_rank_maps(backbone).values()
    ]
    try:
        with torch.no_grad():
            state = backbone.embed(pair)
            if rows:
                return False
            backbone.run(state, backbone.num_layers)
    finally:
        for hook in hooks:
            hook.remove()
    return all(number == 2 for number in rows)


def low_rank_maps(backbone: Backbone) -> dict[str, LowRankMap]:
    """The linear maps with updates of a model, by name."""
    return {name: module for name, module in backbone.model.named_modules() if isinstance(module, LowRankMap)}


class _JointMap(nn.Module):
    """A linear map of the base that adds to each input the update of its own model.

    Attributes:
        update: A of each input, (R, r, in), and B, (R, out, r); None adds nothing.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.update: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Any:
        """The frozen weight, whose type some families read."""
        return self.base.weight

    def forward(self, values: Tensor) -> Tensor:
        """Apply the map: (R, …, in) to (R, …, out)."""
        output: Tensor = self.base(values)
        if self.update is None:
            return output
        down, up = self.update
        rows = values.reshape(len(values), -1, values.shape[-1]).to(down.dtype)  # (R, S, in)
        added = rows @ down.mT @ up.mT  # (R, S, out)
        return output + added.to(output.dtype).view_as(output)


def _stacked(maps: Sequence[LowRankMap | None]) -> tuple[Tensor, Tensor] | None:
    """A and B of R inputs, filled with zeros up to the largest rank: (R, r, in), (R, out, r); None without updates."""
    first = next((each for each in maps if each is not None), None)
    if first is None:
        return None
    ranks = {0 if each is None else len(each.down) for each in maps}
    if len(ranks) == 1:
        return torch.stack([each.down for each in maps if each]), torch.stack([each.up for each in maps if each])
    rank = max(ranks)
    down = first.down.new_zeros(len(maps), rank, first.down.shape[1])
    up = first.up.new_zeros(len(maps), first.up.shape[0], rank)
    for row, each in enumerate(maps):
        if each is not None:
            down[row, : len(each.down)] = each.down
            up[row, :, : len(each.down)] = each.up
    return down, up
