"""One pass of the frozen backbone over a split, shard by shard: here, or each shard wherever there is a worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from revmux.backbone import Backbone, HiddenState
from revmux.backbone.base import evaluating
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.features.key import backbone_digest
from revmux.features.precision import Precision, measure_precision, spread
from revmux.features.shards import ShardSet, fixed_column, ragged_column

TOKEN_FIELDS = ("positions", "segments", "spans")
"""What a state may say of each token beside the hidden vector."""
PRECISION_INPUTS, PRECISION_INPUTS_A_SHARD = 32, 8
"""Inputs whose rounding is measured, at least: enough for its size; each costs two passes a layer."""


@dataclass(frozen=True)
class FeaturePass:
    """What one store lacks. Every shard is a unit of work of its own, for any process that has the backbone.

    Attributes:
        key: of the store.
        backbone_digest: of the backbone that the store belongs to.
        shard_rows: row numbers of each shard.
        teacher: where the teacher goes.
        layers: where each layer's states go.
        dtype: type of the states on disk.
        batch_size: inputs a forward pass.
    """

    key: str
    backbone_digest: str
    shard_rows: list[np.ndarray]
    teacher: ShardSet
    layers: dict[int, ShardSet]
    dtype: torch.dtype
    batch_size: int

    @cached_property
    def missing(self) -> list[int]:
        """Shards to be written, the longest inputs first."""
        present = [shards.names for shards in (self.teacher, *self.layers.values())]
        return [index for index in range(len(self.shard_rows)) if not all(index in names for names in present)]

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse another backbone than the one whose store this is, as a worker may find it on its own disk.

        Raises:
            UserError: its weights or settings differ.
        """
        if backbone_digest(backbone) != self.backbone_digest:
            raise UserError(
                "this worker loaded another backbone than the job's driver did: the model's folder has other files "
                "there, or another library version; give every node the same"
            )

    def write_shard(self, backbone: Backbone, split: TokenizedSplit, index: int) -> dict[int, Precision]:
        """Compute and write one shard, of everything that lacks it.

        Args:
            backbone: where it is computed, on its own device, in eval mode.
            split: the tokens.
            index: number of the shard.

        Returns:
            What each layer loses on some of the shard's inputs, where ``dtype`` is not the backbone's.

        Raises:
            UserError: states that ``dtype`` cannot hold, or a place that cannot be written.
        """
        rows = self.shard_rows[index]
        wants_teacher = index not in self.teacher.names
        layers = sorted(layer for layer, shards in self.layers.items() if index not in shards.names)
        pieces = _Pieces(self.dtype, wants_teacher, layers)
        with evaluating(backbone), torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                batch = split.batch(rows[start : start + self.batch_size].tolist(), backbone.device)
                pieces.add(backbone, backbone.embed(batch))
        if wants_teacher:
            self.teacher.write(index, pieces.teacher_columns())
        measured = spread(rows, max(PRECISION_INPUTS_A_SHARD, -(-PRECISION_INPUTS // len(self.shard_rows))))
        losses = {}
        for layer in layers:
            if self.dtype != backbone.dtype:
                losses[layer] = measure_precision(backbone, split, measured, layer, self.dtype, self.batch_size)
            notes = asdict(losses[layer]) if layer in losses else {}
            self.layers[layer].write(index, {"hidden": pieces.column(str(layer))}, notes)
        return losses

    def write(self, backbone: Backbone, split: TokenizedSplit) -> None:
        """Write all missing shards in this process.

        Args:
            backbone: see :meth:`write_shard`.
            split: the tokens.

        Raises:
            UserError: see :meth:`write_shard`.
        """
        total = sum(len(self.shard_rows[index]) for index in self.missing)
        with tqdm(total=total, desc="features", unit=" inputs", disable=None) as bar:
            for index in self.missing:
                self.write_shard(backbone, split, index)
                bar.update(len(self.shard_rows[index]))


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
        return ragged_column(torch.cat(self.parts.pop(name)), torch.cat(self.counts))

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
