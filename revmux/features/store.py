"""The feature store: what the frozen backbone says of each input alone, computed once and read by every run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from pyarrow.fs import FileSystem
from torch import Tensor

from revmux.backbone import HiddenState
from revmux.backbone.base import evaluating
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.features.budget import GIGABYTE, predict_size
from revmux.features.config import StoreConfig, default_root
from revmux.features.key import backbone_digest, combine, tokens_digest
from revmux.features.place import Place
from revmux.features.precision import Precision, noted_precision
from revmux.features.reader import StoredFeatures, TeacherFeatures, TeacherReader
from revmux.features.shards import FORMAT, ShardSet, assign_shards, read_notes, read_object, write_object
from revmux.features.writer import FeaturePass
from revmux.pretrained.pretrained import Pretrained

_log = logging.getLogger(__name__)
META = "meta.json"
AGREEMENT = 0.05
"""Share of their norm by which stored features may differ from computed ones, rounding and hardware included."""


class NotSeenError(UserError):
    """What workers wrote to a store is not there for the process that sent them: they have another disk."""


class FeatureStore:
    """A split's stored features, complete.

    Args:
        key: the name of its folder.
        wanted: layers that were asked for.
        split: the tokens and labels.
        pretrained: the backbone.
        teacher: the teacher's shards.
        layers: the shards of each stored layer.
        shard_rows: row numbers of each shard.
        dtype: type of the states on disk.

    Attributes:
        stored_layers: layers whose states are stored; at the others that were asked for, the prefill is online.
    """

    def __init__(
        self,
        key: str,
        wanted: Sequence[int],
        split: TokenizedSplit,
        pretrained: Pretrained,
        teacher: ShardSet,
        layers: dict[int, ShardSet],
        shard_rows: list[np.ndarray],
        dtype: torch.dtype,
    ) -> None:
        self.key, self.wanted = key, tuple(wanted)
        self.stored_layers = tuple(sorted(layers))
        self._split, self._backbone, self._dtype = split, pretrained.backbone, dtype
        self._teacher = TeacherReader(teacher, shard_rows)
        self._layers = layers
        self._folder = teacher.place.path.rpartition("/")[0]

    def at(self, layer: int) -> TeacherFeatures:
        """The split's features for a prefill of ``layer`` layers.

        Returns:
            States at that depth with the teacher; tokens with the teacher where the states are not stored.

        Raises:
            UserError: the layer was not asked for when the store was opened.
        """
        if layer not in self.wanted:
            raise UserError(
                f"layer {layer} was not asked for; the store was opened for {', '.join(map(str, self.wanted))}; "
                "add it to prefill_layers"
            )
        if layer not in self._layers:
            return self.with_tokens()
        return StoredFeatures(self._split, self._backbone, self._teacher, self._layers[layer], layer, self._dtype)

    def with_tokens(self) -> TeacherFeatures:
        """Tokens and the stored teacher: for models that prefill otherwise than the frozen backbone does."""
        return TeacherFeatures(self._split, self._backbone, self._teacher)

    def precision(self, layer: int) -> Precision | None:
        """What a stored layer lost by its type on disk, measured when it was written; None where that is nothing."""
        return noted_precision(read_notes(self._layers[layer].mapped))

    def check(self, inputs: int = 4) -> None:
        """Compare some inputs with what the backbone says now: its code can change where its weights do not.

        Args:
            inputs: how many, evenly spread over the split.

        Raises:
            UserError: the stored features are not the backbone's.
        """
        rows = np.linspace(0, len(self._split) - 1, min(inputs, len(self._split))).round().astype(np.int64)
        with evaluating(self._backbone), torch.inference_mode():
            state = self._backbone.embed(self._split.batch(rows.tolist(), self._backbone.device))
            for layer in self.stored_layers:
                state = self._backbone.run(state, layer)
                stored = self.at(layer).batch(rows.tolist()).prefilled
                assert stored is not None
                self._compare(stored.hidden[stored.mask], state.hidden[state.mask], f"layer {layer}")
            answer = self._backbone.answers(self._backbone.run(state, self._backbone.num_layers))[:, 0]  # (B, d)
            self._compare(self._teacher.take("vectors", rows), self._backbone.readout(answer), "the teacher")

    def _compare(self, stored: Tensor, computed: Tensor, name: str) -> None:
        stored, computed = stored.float().cpu(), computed.float().cpu()
        if stored.shape != computed.shape or float((stored - computed).norm()) > AGREEMENT * float(computed.norm()):
            raise UserError(
                f"{self._folder}: what it holds of {name} is not what the backbone computes now: library versions have "
                "changed, or its answers depend on padding, which no store can hold; remove that folder, or: "
                f"python -m revmux cache rm {self.key}"
            )


def open_features(
    pretrained: Pretrained,
    split: TokenizedSplit,
    prefill_layers: Sequence[int],
    config: StoreConfig | None = None,
    filesystem: FileSystem | None = None,
    weights: str | None = None,
) -> FeatureStore:
    """Open the store of a backbone's features of a split; what of it is not there yet is computed and written.

    Processes that ask for the same store at once do the work once: the others wait and read.

    Args:
        pretrained: the frozen backbone.
        split: the tokens.
        prefill_layers: depths whose states are wanted, 0 (embeddings) to L; may be empty.
        config: where and how to store.
        filesystem: where ``config.root`` is a path, if not on the local disk.
        weights: :func:`revmux.features.key.backbone_digest` of the backbone as it is now, of a caller that opens several
            stores of it; computed where it is not given.

    Raises:
        UserError: a layer out of range, an empty split, or a place that cannot be written.
    """
    return StoreBuilder(pretrained, split, prefill_layers, config, filesystem, weights).open()


class StoreBuilder:
    """Finds, completes and opens one store; its arguments are those of :func:`open_features`.

    Attributes:
        key: of the store.
        split: the tokens.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        split: TokenizedSplit,
        prefill_layers: Sequence[int],
        config: StoreConfig | None = None,
        filesystem: FileSystem | None = None,
        weights: str | None = None,
    ) -> None:
        self.config = config or StoreConfig()
        self.pretrained, self.backbone, self.split = pretrained, pretrained.backbone, split
        self.wanted = sorted({int(layer) for layer in prefill_layers})
        for layer in self.wanted:
            if not 0 <= layer <= self.backbone.num_layers:
                raise UserError(f"prefill layer {layer} does not exist; choose 0..{self.backbone.num_layers}")
        if not len(split):
            raise UserError("the split is empty; bring at least one example")
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.shard_rows = assign_shards(split.lengths.numpy(), self.config.shard_inputs)
        self.ingredients = {
            "format": FORMAT,
            "backbone": weights or backbone_digest(self.backbone),
            "tokens": tokens_digest(split),
            "shard_inputs": self.config.shard_inputs,
        }
        self.key = combine(self.ingredients)
        self.root = Place.open(self.config.root or default_root(), filesystem)
        self.place = self.root.child(self.key)
        self.copies = None if self.root.local else Place.open(self.config.copies).child(self.key)
        self.teacher = self._shards("teacher")
        self.layers = {layer: self._shards(layer_folder(layer, self.config.dtype)) for layer in self.wanted}

    def complete(self, verify: bool = True) -> bool:
        """Whether all that is wanted is stored.

        Args:
            verify: read and hash every shard; else their names are believed.
        """
        missing = [shards.find(verify) for shards in (self.teacher, *self.layers.values())]
        return not any(missing)

    @contextmanager
    def filling(self, verify: bool = True) -> Iterator[FeaturePass]:
        """Be the one process that completes the store, waiting for another that is at it.

        Args:
            verify: see :meth:`complete`.

        Yields:
            What is to be written, as far as the budget goes; at the end it is there.

        Raises:
            NotSeenError: what was written is not seen here.
        """
        self.root.create()
        with self.root.exclusive(f"{self.key}.lock"):
            self.complete(verify)  # another process may have written since
            self.layers = self._affordable()
            for shards in (self.teacher, *self.layers.values()):
                shards.place.create()
                shards.sweep()
            self.place.sweep()
            self._describe(self.place)
            backbone = self.ingredients["backbone"]
            yield FeaturePass(
                self.key, str(backbone), self.shard_rows, self.teacher, self.layers, self.dtype, self.config.batch_size
            )
            if not self.complete(verify):
                raise NotSeenError(
                    f"{self.place.path}: what was written there is not seen from here; name a root that every node "
                    "reaches under the same name, a shared folder or a URI"
                )

    def open(self) -> FeatureStore:
        """The store, completed here as far as the budget goes."""
        if not self.complete():
            with self.filling() as missing:
                missing.write(self.backbone, self.split)
        if self.copies is not None:
            self.copies.create()
            self._describe(self.copies)
        store = FeatureStore(
            self.key, self.wanted, self.split, self.pretrained, self.teacher, self.layers, self.shard_rows, self.dtype
        )
        store.check()
        return store

    def _shards(self, name: str) -> ShardSet:
        copies = None if self.copies is None else self.copies.child(name)
        return ShardSet(self.place.child(name), len(self.shard_rows), copies)

    def _affordable(self) -> dict[int, ShardSet]:
        """The layers to store: all, or those that are there already."""
        complete = {layer: shards for layer, shards in self.layers.items() if len(shards.names) == len(self.shard_rows)}
        missing = sorted(set(self.layers) - set(complete))
        if not missing:
            return self.layers
        probe = self._probe()
        if probe.decoder is not None:
            _log.warning(
                "%s has a decoder that reads the text too, which the store does not hold; "
                "storing the teacher only and computing the prefill online",
                self.pretrained.identity["name"],
            )
            return complete
        prompt = int(probe.mask.sum()) - int(self.split.lengths[0])
        size = predict_size(self.split, self.backbone, self.dtype, prompt)
        used = self.place.size()
        kept = used - sum(self.layers[layer].place.size() for layer in missing)
        needed = max(kept, size.teacher) + size.layer * len(missing)
        disk = self._disk()
        limit = None
        if needed > self.config.budget_gb * GIGABYTE:
            limit = f"budget_gb = {self.config.budget_gb:g}"
        elif needed > disk:
            limit = f"the {disk / GIGABYTE:.3g} GB that the disk has for them"
        if limit is not None:
            _log.warning(
                "features at layers %s of %d inputs need %.3g GB, over %s; "
                "storing the teacher only and computing the prefill online",
                missing,
                len(self.split),
                needed / GIGABYTE,
                limit,
            )
            return complete
        return self.layers

    def _probe(self) -> HiddenState:
        with torch.inference_mode():
            return self.backbone.embed(self.split.batch([0], self.backbone.device))

    def _disk(self) -> int:
        """Bytes that the disk from which shards are mapped has for this store, with what it takes there already."""
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
