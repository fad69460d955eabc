"""One pass of the frozen backbone over a split, shard by shard, in this process or distributed over workers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from revmux.backbone import Backbone, HiddenState
from revmux.backbone.base import evaluating
from revmux.data.tokens import SplitTokens
from revmux.errors import UserError
from revmux.features.key import backbone_digest
from revmux.features.precision import Precision, measure_precision, spread
from revmux.features.shards import Layout, ShardSet, fixed_column, ragged_column

FIXED_FIELDS = ("vectors", "scores", "answer")
"""Values per input: the input of the plain model's classifier (r), its label scores (C), and the answer's positions (A)."""
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
        layout: the rows of each shard.
        teacher: shards of the teacher; None if the budget allows none, and then there is nothing to write.
        layers: shards of each layer's states.
        dtype: type of the states on disk.
        batch_size: inputs per forward pass.
    """

    key: str
    backbone_digest: str
    layout: Layout
    teacher: ShardSet | None
    layers: dict[int, ShardSet]
    dtype: torch.dtype
    batch_size: int

    @cached_property
    def missing(self) -> list[int]:
        """The shards to write."""
        if self.teacher is None:
            return []
        present = [shards.names for shards in (self.teacher, *self.layers.values())]
        return [index for index in range(len(self.layout)) if not all(index in names for names in present)]

    def check_backbone(self, backbone: Backbone) -> None:
        """Check that a backbone is the store's own. A worker may have loaded other files from its own disk.

        Raises:
            UserError: the weights or settings differ.
        """
        if backbone_digest(backbone) != self.backbone_digest:
            raise UserError(
                "this worker loaded another backbone than the process that prepared the pass: the files in the model's folder or the library "
                "versions differ; use the same files and versions on every node"
            )

    def write_shard(self, backbone: Backbone, split: SplitTokens, index: int) -> dict[int, Precision]:
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
        layers = sorted(layer for layer, shards in self.layers.items() if index not in shards.names)
        losses = self._losses(backbone, split, index, layers)
        with ExitStack() as stack:
            writers = {
                layer: stack.enter_context(self.layers[layer].writing(index, asdict(losses[layer]) if losses else None))
                for layer in layers
            }
            teacher = None
            if self.teacher is not None and index not in self.teacher.names:
                teacher = stack.enter_context(self.teacher.writing(index))
            for rows in self.layout.parts_of(index):
                order = np.argsort(-split.lengths[rows].long().numpy(), kind="stable")  # like lengths share a batch
                pieces = _Pieces(self.dtype, teacher is not None, layers, order)
                with evaluating(backbone), torch.inference_mode():
                    for start in range(0, len(rows), self.batch_size):
                        batch = rows[order[start : start + self.batch_size]].tolist()
                        pieces.add(backbone, _embed(backbone, split, batch))
                if teacher is not None:
                    teacher.add(pieces.teacher_columns())
                for layer, writer in writers.items():
                    writer.add({"hidden": pieces.ragged(str(layer))})
        return losses

    def _losses(self, backbone: Backbone, split: SplitTokens, index: int, layers: list[int]) -> dict[int, Precision]:
        """The precision loss of each layer on some of a shard's inputs; empty if there is none."""
        if self.dtype == backbone.dtype:
            return {}
        count = max(PRECISION_INPUTS_PER_SHARD, -(-PRECISION_INPUTS // len(self.layout)))
        measured = spread(self.layout.rows(index), count)
        return {
            layer: measure_precision(backbone, split, measured, layer, self.dtype, self.batch_size) for layer in layers
        }

    def write(self, backbone: Backbone, split: SplitTokens) -> None:
        """Write all missing shards in this process.

        Args:
            backbone: see :meth:`write_shard`.
            split: the tokens.

        Raises:
            UserError: see :meth:`write_shard`.
        """
        total = sum(len(self.layout.rows(index)) for index in self.missing)
        with tqdm(total=total, desc="features", unit=" inputs", disable=None) as bar:
            for index in self.missing:
                self.write_shard(backbone, split, index)
                bar.update(len(self.layout.rows(index)))


def _embed(backbone: Backbone, split: SplitTokens, rows: list[int]) -> HiddenState:
    """The embeddings of some inputs.

    Raises:
        UserError: an input does not begin with the constant tokens of its prompt.
    """
    state = backbone.embed(split.batch(rows, backbone.device))
    if state.prefix is not backbone.constant_prefix():
        raise UserError(
            "some inputs do not begin with the constant tokens of the prompt, so their states cannot be stored; "
            "put a space between the template and the text"
        )
    return state


class _Pieces:
    """Accumulates the batches of one part.

    Args:
        dtype: type of the states on disk.
        wants_teacher: whether to store the teacher.
        layers: depths whose states are stored, in increasing order.
        order: (R,) the row of the part that each computed input is.
    """

    def __init__(self, dtype: torch.dtype, wants_teacher: bool, layers: list[int], order: np.ndarray) -> None:
        self.dtype, self.wants_teacher, self.layers = dtype, wants_teacher, layers
        self.place = torch.from_numpy(np.argsort(order))  # (R,) the computed input that each row is
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

    def ragged(self, name: str) -> Any:
        """The tokens of all rows as one Arrow column, one list per row."""
        counts = torch.cat(self.counts)
        wanted = counts[self.place]  # (R,) tokens per row
        starts = (counts.cumsum(0) - counts)[self.place]
        shift = starts - (wanted.cumsum(0) - wanted)
        tokens = torch.arange(int(counts.sum())) + shift.repeat_interleave(wanted)  # (T,) where each token was computed
        return ragged_column(torch.cat(self.parts.pop(name))[tokens], wanted)

    def teacher_columns(self) -> dict[str, Any]:
        """The columns that are stored once for all layers."""
        columns = {name: fixed_column(torch.cat(self.parts[name])[self.place]) for name in FIXED_FIELDS}
        return columns | {name: self.ragged(name) for name in TOKEN_FIELDS if name in self.parts}

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
