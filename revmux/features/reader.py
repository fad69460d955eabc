"""Padded batches of stored features, for the inner loop of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.data.tokens import TokenizedSplit
from revmux.features.base import FeatureBatch
from revmux.features.pages import MappedPages
from revmux.features.shards import ShardSet, fixed_values, ragged_values


class RowIndex:
    """The shard and the row of each input.

    Args:
        shard_rows: row numbers of each shard.

    Attributes:
        shard: (M,) the shard of each input.
        place: (M,) the row of each input in its shard.
    """

    def __init__(self, shard_rows: list[np.ndarray]) -> None:
        total = sum(len(rows) for rows in shard_rows)
        self.shard = np.empty(total, np.int32)
        self.place = np.empty(total, np.int32)
        for index, rows in enumerate(shard_rows):
            self.shard[rows] = index
            self.place[rows] = np.arange(len(rows))


class FixedRows:
    """A column of rows of equal width over all shards. The values stay on disk until they are read."""

    def __init__(self, shards: list[np.ndarray], index: RowIndex, pages: MappedPages) -> None:
        self.shards, self.index, self.pages = shards, index, pages

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the given rows: (B,) to (B, W)."""
        taken = np.empty((len(rows), self.shards[0].shape[1]), self.shards[0].dtype)
        owners, places = self.index.shard[rows], self.index.place[rows]
        for shard in np.unique(owners):
            here = np.flatnonzero(owners == shard)
            taken[here] = self.shards[shard][places[here]]
        self.pages.touch(len(rows), taken.nbytes)
        return taken


class RaggedRows:
    """A column of rows of different length over all shards. The values stay on disk until they are read.

    Args:
        shards: each shard's values (T, ...) and offsets (R + 1,).
        shard_rows: row numbers of each shard.
        index: the shard and row of each input.
        pages: the pages of the shard files.

    Attributes:
        counts: (M,) tokens of each input.
    """

    def __init__(
        self,
        shards: list[tuple[np.ndarray, np.ndarray]],
        shard_rows: list[np.ndarray],
        index: RowIndex,
        pages: MappedPages,
    ) -> None:
        self.values = [values for values, _ in shards]
        self.index, self.pages = index, pages
        self.starts = np.empty(len(index.shard), np.int64)
        self.counts = np.empty(len(index.shard), np.int64)
        for rows, (_, offsets) in zip(shard_rows, shards, strict=True):
            self.starts[rows] = offsets[:-1]
            self.counts[rows] = np.diff(offsets)

    def padded(self, rows: np.ndarray, pad_left: bool, pin: bool = False) -> Tensor:
        """Read the given rows as a padded batch: (B,) to (B, S, ...), zero at padding.

        Args:
            rows: the inputs.
            pad_left: whether padding comes before the tokens.
            pin: whether to return page-locked memory, for copies to a GPU.
        """
        counts = self.counts[rows]
        length = int(counts.max())
        sample = self.values[0]
        shape = (len(rows), length, *sample.shape[1:])
        batch = torch.empty(shape, dtype=getattr(torch, sample.dtype.name), pin_memory=pin)
        view = batch.numpy()
        where = zip(self.index.shard[rows].tolist(), self.starts[rows].tolist(), counts.tolist(), strict=True)
        # An input's tokens are contiguous, so one copy per input is faster than a gather per token.
        for target, (shard, start, count) in zip(view, where, strict=True):
            source = self.values[shard][start : start + count]
            if pad_left:
                target[: length - count] = 0
                target[length - count :] = source
            else:
                target[:count] = source
                target[count:] = 0
        self.pages.touch(len(rows), view.nbytes)
        return batch


class TeacherReader:
    """The values that are stored once per input, for all layers.

    Args:
        shards: the teacher's shards.
        shard_rows: row numbers of each shard.
    """

    def __init__(self, shards: ShardSet, shard_rows: list[np.ndarray]) -> None:
        self.shard_rows, self.index = shard_rows, RowIndex(shard_rows)
        batches, files = zip(*(shards.read(index) for index in range(len(shard_rows))), strict=True)
        pages = MappedPages(files)
        self._fixed = {
            name: FixedRows([fixed_values(batch.column(name)) for batch in batches], self.index, pages)
            for name in ("vectors", "scores", "answer")
        }
        self._ragged = {
            name: RaggedRows([ragged_values(batch.column(name)) for batch in batches], shard_rows, self.index, pages)
            for name in batches[0].schema.names
            if name not in self._fixed
        }
        pages.release()  # the pages read so far

    def take(self, name: str, rows: np.ndarray) -> Tensor:
        """``vectors`` (B, r), ``scores`` (B, C) or ``answer`` (B, A), positions relative to an input's first token."""
        return torch.from_numpy(self._fixed[name].take(rows))

    def padded(self, name: str, rows: np.ndarray, pad_left: bool) -> Tensor | None:
        """``positions`` (B, S), ``segments`` (B, S) or ``spans`` (B, S, A); None if the family has none."""
        return self._ragged[name].padded(rows, pad_left) if name in self._ragged else None


class TeacherFeatures:
    """Tokens and the stored teacher. The model computes the prefill.

    Args:
        split: the tokens and labels.
        backbone: the backbone, which determines the device and type of the batches.
        teacher: the stored teacher.
    """

    def __init__(self, split: TokenizedSplit, backbone: Backbone, teacher: TeacherReader) -> None:
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
            labels=self.labels[torch.from_numpy(rows)].to(device),
            teacher_vectors=self.teacher.take("vectors", rows).to(device, dtype),
            teacher_scores=self.teacher.take("scores", rows).to(device, dtype),
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
        split: TokenizedSplit,
        backbone: Backbone,
        teacher: TeacherReader,
        shards: ShardSet,
        depth: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(split, backbone, teacher)
        self.depth, self.dtype = depth, dtype
        self.pad_left = split.tokenizer.padding_side == "left"
        shard_rows = teacher.shard_rows
        batches, files = zip(*(shards.read(index) for index in range(len(shard_rows))), strict=True)
        columns = [ragged_values(batch.column("hidden")) for batch in batches]
        pages = MappedPages(files)
        self.states = RaggedRows(columns, shard_rows, teacher.index, pages)
        pages.release()  # the pages read so far

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """See :meth:`revmux.features.base.Features.batch`."""
        picked = as_rows(rows)
        return replace(self._labelled(picked), prefilled=self._state(picked))

    def _state(self, rows: np.ndarray) -> HiddenState:
        device = self.backbone.device
        hidden = self.states.padded(rows, self.pad_left, pin=device.type == "cuda").view(self.dtype)  # (B, S, d)
        # States in half precision are converted after the copy to the device, which halves the transfer.
        hidden = hidden.to(device, non_blocking=True).to(self.backbone.dtype)
        counts = torch.from_numpy(self.states.counts[rows]).unsqueeze(1)  # (B, 1)
        length = hidden.shape[1]
        first = length - counts if self.pad_left else torch.zeros_like(counts)  # (B, 1)
        place = torch.arange(length)
        spans = self.teacher.padded("spans", rows, self.pad_left)  # (B, S, A)
        segments = self.teacher.padded("segments", rows, self.pad_left)
        return HiddenState(
            hidden=hidden,
            mask=((place >= first) & (place < first + counts)).to(device),
            answer=(self.teacher.take("answer", rows).long() + first).to(device),
            depth=self.depth,
            positions=self._positions(rows, counts),
            segments=None if segments is None else segments.long().to(device),
            spans=None if spans is None else spans.bool().transpose(1, 2).to(device),
            prefix=self.backbone.constant_prefix(),
        )

    def _positions(self, rows: np.ndarray, counts: Tensor) -> Tensor | None:
        positions = self.teacher.padded("positions", rows, self.pad_left)  # (B, S)
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
