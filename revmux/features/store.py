"""The feature store: the frozen backbone's outputs for each input alone, computed once and read by every run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from pyarrow.fs import FileSystem
from torch import Tensor

from revmux.backbone.base import evaluating
from revmux.data.tokens import SplitTokens
from revmux.errors import UserError
from revmux.features.base import Features
from revmux.features.budget import GIGABYTE, Probe, StoreSize, predict_size, probe
from revmux.features.config import StoreConfig, default_root
from revmux.features.key import backbone_digest, combine
from revmux.features.online import OnlineFeatures
from revmux.features.precision import Precision, noted_precision, spread
from revmux.features.reader import StoredColumns, StoredFeatures, TeacherFeatures
from revmux.features.shards import (
    FORMAT,
    META,
    Layout,
    ShardSet,
    assign_shards,
    inputs_per_shard,
    read_notes,
    read_object,
    write_object,
)
from revmux.features.writer import FeaturePass
from revmux.pretrained.pretrained import Pretrained
from revmux.utils.place import Place

_log = logging.getLogger(__name__)
AGREEMENT = 0.05
"""Maximum relative difference between stored and computed features, which covers rounding and hardware."""


class NotSeenError(UserError):
    """The process that started the workers cannot see the shards that they wrote, since they have another disk."""


class FeatureStore:
    """The complete stored features of a split.

    Args:
        key: name of the store's folder.
        wanted: the requested layers.
        split: the tokens and labels.
        pretrained: the backbone.
        teacher: the teacher's shards; None if the teacher is not stored.
        layers: the shards of each stored layer.
        layout: the rows of each shard.
        dtype: type of the states on disk.

    Attributes:
        has_teacher: whether the teacher is stored. Otherwise, it is computed online.
        stored_layers: layers whose states are stored. For the other requested layers, the prefill is computed online.
    """

    def __init__(
        self,
        key: str,
        wanted: Sequence[int],
        split: SplitTokens,
        pretrained: Pretrained,
        folder: str,
        teacher: ShardSet | None,
        layers: dict[int, ShardSet],
        layout: Layout,
        dtype: torch.dtype,
    ) -> None:
        self.key, self.wanted = key, tuple(wanted)
        self.stored_layers = tuple(sorted(layers))
        self._split, self._backbone, self._dtype = split, pretrained.backbone, dtype
        self.has_teacher = teacher is not None
        self._teacher = None if teacher is None else StoredColumns(teacher, layout)
        self._layers, self._folder = layers, folder

    def at(self, layer: int) -> Features:
        """The split's features for a prefill of ``layer`` layers.

        Returns:
            The states at that depth and the teacher; tokens and the teacher if the states are not stored; or the states and
            the teacher, computed per batch, if nothing is stored.

        Raises:
            UserError: the layer was not requested when the store was opened.
        """
        if layer not in self.wanted:
            raise UserError(
                f"layer {layer} was not requested; the store was opened for {', '.join(map(str, self.wanted))}; "
                "add it to prefill_layers"
            )
        if self._teacher is None:
            return OnlineFeatures(self._split, self._backbone, prefill_layers=layer)
        if layer not in self._layers:
            return self.with_tokens()
        return StoredFeatures(self._split, self._backbone, self._teacher, self._layers[layer], layer, self._dtype)

    def with_tokens(self) -> Features:
        """Tokens and the teacher, for models whose prefill differs from that of the frozen backbone."""
        if self._teacher is None:
            return OnlineFeatures(self._split, self._backbone)
        return TeacherFeatures(self._split, self._backbone, self._teacher)

    def precision(self, layer: int) -> Precision | None:
        """The precision loss of a stored layer, measured when it was written. None if there is no loss."""
        return noted_precision(read_notes(self._layers[layer].mapped))

    def check(self, inputs: int = 4) -> None:
        """Compare the stored features of some inputs with the backbone's current output, since library code may change.

        Args:
            inputs: number of inputs, evenly spaced over the first shard.

        Raises:
            UserError: the stored features differ from the backbone's output.
        """
        if self._teacher is None:
            return
        rows = np.array(spread(self._teacher.layout.rows(0), inputs))
        with evaluating(self._backbone), torch.inference_mode():
            state = self._backbone.embed(self._split.batch(rows.tolist(), self._backbone.device))
            for layer in self.stored_layers:
                state = self._backbone.run(state, layer)
                stored = self.at(layer).batch(rows.tolist()).prefilled
                assert stored is not None
                self._compare(stored.hidden[stored.mask], state.hidden[state.mask], f"layer {layer}")
            answer = self._backbone.answers(self._backbone.run(state, self._backbone.num_layers))[:, 0]  # (B, d)
            vectors = torch.from_numpy(self._teacher.fixed("vectors", rows))
            self._compare(vectors, self._backbone.readout(answer), "the teacher")

    def _compare(self, stored: Tensor, computed: Tensor, name: str) -> None:
        stored, computed = stored.float().cpu(), computed.float().cpu()
        if stored.shape != computed.shape or float((stored - computed).norm()) > AGREEMENT * float(computed.norm()):
            raise UserError(
                f"{self._folder}: the stored features of {name} differ from what the backbone computes now; either library "
                "versions have changed, or its answers depend on padding, which a store does not support; remove that "
                f"folder, or run: revmux cache rm {self.key} --root {self._folder.rpartition('/')[0]}"
            )


def open_features(
    pretrained: Pretrained,
    split: SplitTokens,
    prefill_layers: Sequence[int],
    config: StoreConfig | None = None,
    filesystem: FileSystem | None = None,
    weights: str | None = None,
    verify: bool | None = None,
) -> FeatureStore:
    """Open the store of a backbone's features of a split. Missing features are computed and written.

    If several processes open the same store at once, one of them computes the features and the others wait.

    Args:
        pretrained: the frozen backbone.
        split: the tokens.
        prefill_layers: depths whose states are requested, from 0 (embeddings) to L. May be empty.
        config: settings of the store.
        filesystem: the filesystem of the path ``config.root``. By default, the local disk.
        weights: the current :func:`revmux.features.key.backbone_digest` of the backbone, to avoid computing it again for
            several stores. By default, it is computed.
        verify: see :meth:`StoreBuilder.open`.

    Raises:
        UserError: a layer is out of range, the split is empty, or the store cannot be written.
    """
    return StoreBuilder(pretrained, split, prefill_layers, config, filesystem, weights).open(verify)


class StoreBuilder:
    """Finds, completes and opens one store. The other arguments are those of :func:`open_features`.

    With ``weights`` and ``probed``, a backbone on the meta device suffices to find what is missing.

    Args:
        probed: the :func:`revmux.features.budget.probe` of the backbone. By default, it is taken if needed.

    Attributes:
        key: key of the store.
        split: the tokens.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        split: SplitTokens,
        prefill_layers: Sequence[int],
        config: StoreConfig | None = None,
        filesystem: FileSystem | None = None,
        weights: str | None = None,
        probed: Probe | None = None,
    ) -> None:
        self.config = config or StoreConfig()
        self.pretrained, self.backbone, self.split = pretrained, pretrained.backbone, split
        self.wanted = sorted({int(layer) for layer in prefill_layers})
        for layer in self.wanted:
            if not 0 <= layer <= self.backbone.num_layers:
                raise UserError(f"prefill layer {layer} does not exist; choose 0..{self.backbone.num_layers}")
        if not len(split):
            raise UserError("the split is empty; provide at least one example")
        self.probed = probed
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        row = (self.backbone.readout_size + self.backbone.num_labels) * 4
        shard_inputs = self.config.shard_inputs or inputs_per_shard(len(split), row)
        self.layout = assign_shards(split.lengths.numpy(), shard_inputs)
        self.ingredients = {
            "format": FORMAT,
            "backbone": weights or backbone_digest(self.backbone),
            "tokens": split.digest,
            "shard_inputs": shard_inputs,
        }
        self.key = combine(self.ingredients)
        self.root = Place.open(self.config.root or default_root(), filesystem)
        self.place = self.root.child(self.key)
        self.copies = None if self.root.local else Place.open(self.config.copies).child(self.key)
        self.teacher: ShardSet | None = self._shards("teacher")
        self.layers = {layer: self._shards(layer_folder(layer, self.config.dtype)) for layer in self.wanted}

    def complete(self, verify: bool = True) -> bool:
        """Whether all requested features are stored.

        Args:
            verify: whether to read and hash every shard. Otherwise, each is checked when it is first read.
        """
        missing = [shards.find(verify) for shards in self._stored()]
        return not any(missing)

    @contextmanager
    def filling(self, verify: bool = True) -> Iterator[FeaturePass]:
        """Hold the store's lock while it is completed; wait if another process holds it.

        Args:
            verify: see :meth:`complete`.

        Yields:
            The missing shards within the budget. The caller must write them before the block ends.

        Raises:
            NotSeenError: this process cannot see the shards that were written.
        """
        self.root.create()
        with self.root.exclusive(f"{self.key}.lock"):
            self.complete(verify)  # another process may have written since
            self.teacher, self.layers = self._affordable()
            for shards in self._stored():
                shards.place.create()
                shards.sweep()
            if self.teacher is not None:
                self.place.sweep()
                self._describe(self.place)
            backbone = self.ingredients["backbone"]
            yield FeaturePass(
                self.key, str(backbone), self.layout, self.teacher, self.layers, self.dtype, self.config.batch_size
            )
            if not self.complete(verify):
                raise NotSeenError(
                    f"{self.place.path}: this process cannot see the shards that were written there; name a root that "
                    "every node reaches under the same name, such as a shared folder or a URI"
                )

    def open(self, verify: bool | None = None) -> FeatureStore:
        """Open the store. Missing features within the budget are computed in this process.

        Args:
            verify: see :meth:`complete`. By default, only local shards are verified, since others would be copied.
        """
        verify = self.root.local if verify is None else verify
        if not self.complete(verify):
            with self.filling(verify) as missing:
                missing.write(self.backbone, self.split)
        if self.copies is not None and self.teacher is not None:
            self.copies.create()
            self._describe(self.copies)
        store = FeatureStore(
            self.key,
            self.wanted,
            self.split,
            self.pretrained,
            self.place.path,
            self.teacher,
            self.layers,
            self.layout,
            self.dtype,
        )
        store.check()
        return store

    def _stored(self) -> list[ShardSet]:
        """The teacher and all layers, as far as they are within the budget."""
        return [shards for shards in (self.teacher, *self.layers.values()) if shards is not None]

    def _shards(self, name: str) -> ShardSet:
        copies = None if self.copies is None else self.copies.child(name)
        return ShardSet(self.place.child(name), len(self.layout), copies)

    def _affordable(self) -> tuple[ShardSet | None, dict[int, ShardSet]]:
        """The teacher and the layers to store, within the budget.

        These are all requested layers if they fit together with the teacher; otherwise the teacher and the layers that are
        already stored; or nothing if not even the teacher fits.
        """
        complete = {layer: shards for layer, shards in self.layers.items() if self._is_whole(shards)}
        missing = sorted(set(self.layers) - set(complete))
        assert self.teacher is not None
        if not missing and self._is_whole(self.teacher):
            return self.teacher, self.layers
        probed = self.probed or probe(self.backbone, self.split)
        if missing and probed.has_decoder:
            _log.warning(
                "%s has a decoder that also reads the text, which the store does not support; "
                "storing the teacher only and computing the prefill online",
                self.pretrained.identity["name"],
            )
            missing = []
        size = predict_size(self.split, self.backbone, self.dtype, probed.added)
        limits = [(self.config.budget_gb, f"budget_gb = {self.config.budget_gb:g}")]
        disk = self._disk() / GIGABYTE
        limits.append((disk, f"the {disk:.3g} GB available on disk"))
        has_teacher = self._is_whole(self.teacher)
        if not has_teacher and not self._fits("the teacher's outputs", self._needed(size, []), limits, "nothing"):
            return None, {}
        what = f"features at layers {missing}"
        if missing and self._fits(what, self._needed(size, missing), limits, "the teacher only"):
            return self.teacher, self.layers
        return self.teacher, complete

    def _is_whole(self, shards: ShardSet) -> bool:
        return len(shards.names) == len(self.layout)

    def _needed(self, size: StoreSize, layers: list[int]) -> float:
        """The gigabytes of the store with the given layers, besides everything that is already stored."""
        incomplete = [self.layers[layer] for layer in layers]
        assert self.teacher is not None
        kept = self.place.size() - sum(shards.place.size() for shards in (self.teacher, *incomplete))
        return (kept + size.teacher + size.layer * len(layers)) / GIGABYTE

    def _fits(self, what: str, needed: float, limits: list[tuple[float, str]], instead: str) -> bool:
        """Whether a size is within all limits; otherwise a warning says which one it exceeds."""
        for limit, name in limits:
            if needed > limit:
                _log.warning(
                    "%s of %d inputs need %.3g GB, more than %s; storing %s and computing the rest online",
                    what,
                    len(self.split),
                    needed,
                    name,
                    instead,
                )
                return False
        return True

    def _disk(self) -> int:
        """Free bytes on the disk from which shards are mapped, plus the bytes that this store already uses there."""
        place, root = (self.place, self.root) if self.copies is None else (self.copies, Place.open(self.config.copies))
        root.create()
        return place.size() + root.free()

    def _describe(self, place: Place) -> None:
        place.create()
        if not read_object(place, META):
            content = {
                "ingredients": self.ingredients,
                "backbone": self.pretrained.identity,
                "inputs": len(self.split),
                "tokens": int(self.split.lengths.sum()),
                "longest": int(self.split.lengths.max()),
            }
            write_object(place, META, content)


def layer_folder(layer: int, dtype: str) -> str:
    """Name of the folder of one layer's states."""
    return f"layer-{layer:03d}-{dtype}"
