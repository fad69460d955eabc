"""One pass of the frozen backbone over a split, shard by shard, in this process or distributed over workers."""

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
"""Optional values per token in a state, besides the hidden vector."""
PRECISION_INPUTS, PRECISION_INPUTS_PER_SHARD = 32, 8
"""Minimum numbers of inputs whose precision loss is measured, in total and per shard. Each costs two passes per layer."""


@dataclass(frozen=True)
class FeaturePass:
    """The work to complete one store. Each shard is independent, and any process that has the backbone can write it.

    Attributes:
        key: key of the store.
        backbone_digest: digest of the store's backbone.
        shard_rows: row numbers of each shard.
        teacher: shards of the teacher.
        layers: shards of each layer's states.
        dtype: type of the states on disk.
        batch_size: inputs per forward pass.
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
        """The shards to write, the longest inputs first."""
        present = [shards.names for shards in (self.teacher, *self.layers.values())]
        return [index for index in range(len(self.shard_rows)) if not all(index in names for names in present)]

    def check_backbone(self, backbone: Backbone) -> None:
        """Check that a backbone is the store's own. A worker may have loaded other files from its own disk.

        Raises:
            UserError: the weights or settings differ.
        """
        if backbone_digest(backbone) != self.backbone_digest:
            raise UserError(
                "this worker loaded another backbone than the job's driver: the files in the model's folder or the library "
                "versions differ; use the same files and versions on every node"
            )

    def write_shard(self, backbone: Backbone, split: TokenizedSplit, index: int) -> dict[int, Precision]:
        """Compute and write one shard for the teacher and all layers in which it is missing.

        Args:
            backbone: the backbone, which computes on its own device, in eval mode.
            split: the tokens.
            index: number of the shard.

        Returns:
            The precision loss of each layer, measured on some of the shard's inputs, if ``dtype`` differs from the
            backbone's.

        Raises:
            UserError: ``dtype`` cannot represent the states, the shard cannot be written, or an input does not begin
                with the constant tokens of its prompt.
        """
        rows = self.shard_rows[index]
        wants_teacher = index not in self.teacher.names
        layers = sorted(layer for layer, shards in self.layers.items() if index not in shards.names)
        pieces = _Pieces(self.dtype, wants_teacher, layers)
        with evaluating(backbone), torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                batch = split.batch(rows[start : start + self.batch_size].tolist(), backbone.device)
                state = backbone.embed(batch)
                if state.prefix is not backbone.constant_prefix():
                    raise UserError(
                        "some inputs do not begin with the constant tokens of the prompt, so their states cannot be stored; "
                        "put a space between the template and the text"
                    )
                pieces.add(backbone, state)
        if wants_teacher:
            self.teacher.write(index, pieces.teacher_columns())
        measured = spread(rows, max(PRECISION_INPUTS_PER_SHARD, -(-PRECISION_INPUTS // len(self.shard_rows))))
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
    """Accumulates the batches of one shard.

    Args:
        dtype: type of the states on disk.
        wants_teacher: whether to store the teacher.
        layers: depths whose states are stored, in increasing order.
    """

    def __init__(self, dtype: torch.dtype, wants_teacher: bool, layers: list[int]) -> None:
        self.dtype, self.wants_teacher, self.layers = dtype, wants_teacher, layers
        self.parts: dict[str, list[Tensor]] = {}
        self.counts: list[Tensor] = []

    def add(self, backbone: Backbone, state: HiddenState) -> None:
        """Run a batch from its embeddings to the last requested depth, and keep its features."""
        mask = state.mask
        self.counts.append(mask.sum(dim=1).cpu())
        if self.wants_teacher:
            self._add_tokens(state)
        for depth in self.layers:
            state = backbone.run(state, depth)
            self._keep(str(depth), self._convert(state.hidden[mask], depth))  # (T, d), real tokens only
        if self.wants_teacher:
            answer = backbone.answers(backbone.run(state, backbone.num_layers))[:, 0]  # (B, d)
            vectors = backbone.readout(answer)
            self._keep("vectors", vectors.float())
            self._keep("scores", backbone.score(vectors).float())

    def column(self, name: str) -> Any:
        """The tokens of all batches as one Arrow column, one list per input."""
        return ragged_column(torch.cat(self.parts.pop(name)), torch.cat(self.counts))

    def teacher_columns(self) -> dict[str, Any]:
        """The columns that are stored once for all layers."""
        columns = {name: fixed_column(torch.cat(self.parts[name])) for name in ("vectors", "scores", "answer")}
        return columns | {name: self.column(name) for name in TOKEN_FIELDS if name in self.parts}

    def _add_tokens(self, state: HiddenState) -> None:
        mask = state.mask
        first = mask.int().argmax(dim=1, keepdim=True)  # (B, 1) length of the padding on the left
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
