"""Padded batches of stored features, for the inner loop of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.data.tokens import SplitTokens
from revmux.features.base import FeatureBatch
from revmux.features.pages import MappedPages
from revmux.features.shards import Layout, ShardSet, fixed_values, ragged_values


class StoredColumns:
    """Columns of a shard set, by row. A shard is copied, mapped and checked when one of its rows is first read.

    Args:
        shards: the shards.
        layout: their rows.
    """

    def __init__(self, shards: ShardSet, layout: Layout) -> None:
        self.shards, self.layout, self.pages = shards, layout, MappedPages()
        self._files: dict[int, pa.RecordBatchFileReader] = {}
        self._parts: dict[int, dict[str, Any]] = {}

    def names(self, row: int = 0) -> list[str]:
        """The names of the columns, from the shard of a row."""
        return list(self._part(int(self.layout.find(np.array([row]))[0])))

    def fixed(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read a column of rows of equal width: (B,) to (B, W), or to (B,) for a column of single values."""
        owners = self.layout.find(rows)
        taken: np.ndarray | None = None
        for owner in np.unique(owners):
            values = self._part(int(owner))[name]
            here = np.flatnonzero(owners == owner)
            if taken is None:
                taken = np.empty((len(rows), *values.shape[1:]), values.dtype)
            taken[here] = values[rows[here] - self.layout.parts[owner]]
        assert taken is not None
        self.pages.touch(len(rows), taken.nbytes)
        return taken

    def ragged(self, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """Views of a column of rows of different length: (T, ...) per row, valid until the next read."""
        found = []
        for owner, row in zip(self.layout.find(rows).tolist(), rows.tolist(), strict=True):
            values, offsets = self._part(owner)[name]
            place = row - self.layout.parts[owner]
            found.append(values[offsets[place] : offsets[place + 1]])
        return found

    def padded(self, name: str, rows: np.ndarray, pad_left: bool, pin: bool = False) -> tuple[Tensor, Tensor]:
        """Read a column of rows of different length as a padded batch.

        Args:
            name: the column.
            rows: (B,) the inputs.
            pad_left: whether padding comes before the tokens.
            pin: whether to return page-locked memory, for copies to a GPU.

        Returns:
            The batch (B, S, ...), zero at padding, and the tokens of each input (B,).
        """
        sources = self.ragged(name, rows)
        counts = torch.tensor([len(source) for source in sources])
        length = int(counts.max())
        shape = (len(rows), length, *sources[0].shape[1:])
        batch = torch.empty(shape, dtype=getattr(torch, sources[0].dtype.name), pin_memory=pin)
        view = batch.numpy()
        # An input's tokens are contiguous, so one copy per input is faster than a gather per token.
        for target, source in zip(view, sources, strict=True):
            count = len(source)
            if pad_left:
                target[: length - count] = 0
                target[length - count :] = source
            else:
                target[:count] = source
                target[count:] = 0
            self.pages.touch(1, source.nbytes)  # so that a large batch keeps no more pages than a small one
        return batch, counts

    def _part(self, part: int) -> dict[str, Any]:
        """The columns of a part: values, and offsets for rows of different length."""
        if part not in self._parts:
            shard = self.layout.shard_of(part)
            if shard not in self._files:
                self._files[shard], data = self.shards.read(shard)
                self.pages.add(data)
            batch = self._files[shard].get_batch(part - int(self.layout.shards[shard]))
            self._parts[part] = {
                name: ragged_values(column) if pa.types.is_large_list(column.type) else fixed_values(column)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
        return self._parts[part]


class TeacherFeatures:
    """Tokens and the stored teacher. The model computes the prefill.

    Args:
        split: the tokens and labels.
        backbone: the backbone, which determines the device and type of the batches.
        teacher: the stored teacher.
    """

    def __init__(self, split: SplitTokens, backbone: Backbone, teacher: StoredColumns) -> None:
        self.split, self.backbone, self.teacher = split, backbone, teacher
        self.labels, self.lengths = split.labels, split.lengths

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """See :meth:`revmux.features.base.Features.batch`."""
        picked = as_rows(rows)
        return replace(self._labelled(picked), tokens=self.split.batch(picked.tolist(), self.backbone.device))

    def _labelled(self, rows: np.ndarray) -> FeatureBatch:
        device, dtype = self.backbone.device, self.backbone.dtype
        return FeatureBatch(
            labels=self.labels[torch.from_numpy(rows)].long().to(device),
            teacher_vectors=torch.from_numpy(self.teacher.fixed("vectors", rows)).to(device, dtype),
            # Label words have scores in float32, which bfloat16 would round to ties.
            teacher_scores=torch.from_numpy(self.teacher.fixed("scores", rows)).to(
                device, torch.promote_types(dtype, torch.float32)
            ),
        )


class StoredFeatures(TeacherFeatures):
    """Stored states at one depth, and the stored teacher.

    Args:
        split: the labels.
        backbone: the backbone, which determines the device and type of the batches.
        teacher: the stored teacher.
        shards: the states at ``depth``.
        depth: l.
        dtype: type of the states on disk.
    """

    def __init__(
        self,
        split: SplitTokens,
        backbone: Backbone,
        teacher: StoredColumns,
        shards: ShardSet,
        depth: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(split, backbone, teacher)
        self.depth, self.dtype = depth, dtype
        self.pad_left = split.tokenizer.padding_side == "left"
        self.states = StoredColumns(shards, teacher.layout)

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """See :meth:`revmux.features.base.Features.batch`."""
        picked = as_rows(rows)
        return replace(self._labelled(picked), prefilled=self._state(picked))

    def _state(self, rows: np.ndarray) -> HiddenState:
        device = self.backbone.device
        stored, lengths = self.states.padded("hidden", rows, self.pad_left, pin=device.type == "cuda")
        # States in half precision are converted after the copy to the device, which halves the transfer.
        hidden = stored.view(self.dtype).to(device, non_blocking=True).to(self.backbone.dtype)  # (B, S, d)
        counts = lengths.unsqueeze(1)  # (B, 1)
        length = hidden.shape[1]
        first = length - counts if self.pad_left else torch.zeros_like(counts)  # (B, 1)
        place = torch.arange(length)
        spans, segments = self._token_data("spans", rows), self._token_data("segments", rows)  # (B, S, A), (B, S)
        return HiddenState(
            hidden=hidden,
            mask=((place >= first) & (place < first + counts)).to(device),
            answer=(torch.from_numpy(self.teacher.fixed("answer", rows)).long() + first).to(device),
            depth=self.depth,
            positions=self._positions(rows, counts),
            segments=None if segments is None else segments.long().to(device),
            spans=None if spans is None else spans.bool().transpose(1, 2).to(device),
            prefix=self.backbone.constant_prefix(),
        )

    def _token_data(self, name: str, rows: np.ndarray) -> Tensor | None:
        """A value per token that is stored beside the teacher, padded; None if the family has none."""
        if name not in self.teacher.names(int(rows[0])):
            return None
        return self.teacher.padded(name, rows, self.pad_left)[0]

    def _positions(self, rows: np.ndarray, counts: Tensor) -> Tensor | None:
        positions = self._token_data("positions", rows)  # (B, S)
        if positions is None:
            return None
        positions = positions.long()
        if self.pad_left:
            # Padding has the position of the first token, which is not 0 after a constant prefix.
            positions = positions.maximum(positions.gather(1, positions.shape[1] - counts))
        else:
            # Positions continue in the padding, as in the backbones, so that they are increasing.
            behind = (torch.arange(positions.shape[1]) - (counts - 1)).clamp(min=0)  # (B, S)
            positions += (behind > 0) * (positions.gather(1, counts - 1) + behind)
        return positions.to(self.backbone.device)


def as_rows(rows: Sequence[int] | Tensor) -> np.ndarray:
    """Row numbers (B,) as a numpy array."""
    return torch.as_tensor(rows, dtype=torch.long).cpu().numpy()
