"""One pass of the frozen backbone over a split, written shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from revmux.backbone import Backbone, HiddenState
from revmux.backbone.base import evaluating
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.features.shards import ShardSet, fixed_column, ragged_column

TOKEN_FIELDS = ("positions", "segments", "spans")
"""What a state may say of each token beside the hidden vector."""


def write_features(
    backbone: Backbone,
    split: TokenizedSplit,
    plan: list[np.ndarray],
    teacher: ShardSet,
    layers: Mapping[int, ShardSet],
    dtype: torch.dtype,
    batch_size: int,
    alive: Callable[[], None],
) -> None:
    """Compute and write the shards that are not there; what is there is left as it is.

    Args:
        backbone: where the pass runs, on its own device, in eval mode.
        split: the tokens.
        plan: rows of each shard.
        teacher: where the teacher goes.
        layers: where each layer's states go.
        dtype: type of the states on disk.
        batch_size: inputs a forward pass.
        alive: called after every batch.

    Raises:
        UserError: states that ``dtype`` cannot hold.
    """
    missing = {index for shards in (teacher, *layers.values()) for index in shards.repair()}
    total = sum(len(plan[index]) for index in missing)
    with evaluating(backbone), torch.inference_mode(), tqdm(total=total, desc="features", disable=None) as bar:
        for index in sorted(missing):
            pieces = _Pieces(
                dtype,
                wants_teacher=index not in teacher.records,
                layers=sorted(depth for depth, shards in layers.items() if index not in shards.records),
            )
            for start in range(0, len(plan[index]), batch_size):
                rows = plan[index][start : start + batch_size]
                pieces.add(backbone, backbone.embed(split.batch(rows.tolist(), backbone.device)))
                bar.update(len(rows))
                alive()
            if pieces.wants_teacher:
                teacher.write(index, pieces.teacher_columns())
            for depth in pieces.layers:
                layers[depth].write(index, {"hidden": pieces.column(str(depth))})


class _Pieces:
    """What the batches of one shard have brought so far.

    Args:
        dtype: type of the states on disk.
        wants_teacher: whether the shard's teacher is wanted.
        layers: depths whose states are wanted, rising.
    """

    def __init__(self, dtype: torch.dtype, wants_teacher: bool, layers: list[int]) -> None:
        self.dtype, self.wants_teacher, self.layers = dtype, wants_teacher, layers
        self.parts: dict[str, list[Tensor]] = {}
        self.counts: list[Tensor] = []

    def add(self, backbone: Backbone, state: HiddenState) -> None:
        """Run a batch from its embeddings to the last depth that is wanted."""
        mask = state.mask
        self.counts.append(mask.sum(dim=1).cpu())
        if self.wants_teacher:
            self._add_tokens(state)
        for depth in self.layers:
            state = backbone.run(state, depth)
            self._keep(str(depth), self._convert(state.hidden[mask], depth))  # (T, d), real tokens alone
        if self.wants_teacher:
            answer = backbone.answers(backbone.run(state, backbone.num_layers))[:, 0]  # (B, d)
            vectors = backbone.readout(answer)
            self._keep("vectors", vectors.float())
            self._keep("scores", backbone.score(vectors).float())

    def column(self, name: str) -> Any:
        """All batches' tokens as one Arrow column, one list an input."""
        return ragged_column(torch.cat(self.parts[name]), torch.cat(self.counts))

    def teacher_columns(self) -> dict[str, Any]:
        """What is stored once for all layers."""
        columns = {name: fixed_column(torch.cat(self.parts[name])) for name in ("vectors", "scores", "answer")}
        return columns | {name: self.column(name) for name in TOKEN_FIELDS if name in self.parts}

    def _add_tokens(self, state: HiddenState) -> None:
        mask = state.mask
        first = mask.int().argmax(dim=1, keepdim=True)  # (B, 1) padding on the left
        self._keep("answer", (state.answer - first).int())
        if state.positions is not None:
            self._keep("positions", state.positions[mask].int())  # (T,)
        if state.segments is not None:
            self._keep("segments", state.segments[mask].int())
        if state.spans is not None:
            self._keep("spans", state.spans.transpose(1, 2)[mask].to(torch.uint8))  # (T, A)

    def _convert(self, hidden: Tensor, depth: int) -> Tensor:
        converted = hidden.to(self.dtype)
        if not bool(torch.isfinite(converted).all()):
            raise UserError(
                f"dtype {str(self.dtype).removeprefix('torch.')} cannot hold the states of layer {depth}, as large as "
                f"{float(hidden.abs().max()):.3g}; choose bfloat16 or float32"
            )
        return converted

    def _keep(self, name: str, values: Tensor) -> None:
        self.parts.setdefault(name, []).append(values.cpu())
