"""The feature store: what the frozen backbone says of each input alone, computed once and read by every run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from pyarrow.fs import FileSystem
from torch import Tensor

from revmux.backbone import HiddenState
from revmux.backbone.base import evaluating
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.features.budget import GIGABYTE, predict_size
from revmux.features.config import DTYPES, StoreConfig
from revmux.features.key import backbone_digest, combine, tokens_digest
from revmux.features.place import Place
from revmux.features.precision import measure_precision
from revmux.features.reader import StoredFeatures, TeacherFeatures, TeacherReader
from revmux.features.shards import FORMAT, ShardSet, plan_shards, read_json, write_json
from revmux.features.writer import write_features
from revmux.pretrained import Pretrained

_log = logging.getLogger(__name__)
META = "meta.json"
PRECISION_INPUTS = 32  # enough for the size of rounding; each costs two passes
AGREEMENT = 0.05
"""Share of their norm by which stored features may differ from computed ones, rounding and hardware included."""


class FeatureStore:
    """A split's stored features, complete.

    Args:
        key: the name of its folder.
        wanted: layers that were asked for.
        split: the tokens and labels.
        pretrained: the backbone.
        teacher: the teacher's shards.
        layers: the shards of each stored layer.
        plan: rows of each shard.
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
        plan: list[np.ndarray],
        dtype: torch.dtype,
    ) -> None:
        self.key, self.wanted = key, tuple(wanted)
        self.stored_layers = tuple(sorted(layers))
        self._split, self._backbone, self._dtype = split, pretrained.backbone, dtype
        self._teacher = TeacherReader(teacher, plan)
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

    def notes(self, layer: int) -> dict[str, Any]:
        """What is noted of a stored layer, such as its loss of precision."""
        return dict(self._layers[layer].notes)

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
) -> FeatureStore:
    """Open the store of a backbone's features of a split; what of it is not there yet is computed and written.

    Processes that ask for the same store at once do the work once: the others wait and read.

    Args:
        pretrained: the frozen backbone.
        split: the tokens.
        prefill_layers: depths whose states are wanted, 0 (embeddings) to L; may be empty.
        config: where and how to store.
        filesystem: where ``config.root`` is a path, if not on the local disk.

    Raises:
        UserError: a layer out of range, an empty split, or a place that cannot be written.
    """
    config = config or StoreConfig()
    wanted = sorted({int(layer) for layer in prefill_layers})
    for layer in wanted:
        if not 0 <= layer <= pretrained.backbone.num_layers:
            raise UserError(f"prefill layer {layer} does not exist; choose 0..{pretrained.backbone.num_layers}")
    if not len(split):
        raise UserError("the split is empty; bring at least one example")
    return _Builder(pretrained, split, wanted, config, Place.open(config.root, filesystem)).open()


class _Builder:
    """Finds, completes and opens one store."""

    def __init__(
        self, pretrained: Pretrained, split: TokenizedSplit, wanted: list[int], config: StoreConfig, root: Place
    ) -> None:
        self.pretrained, self.backbone, self.split = pretrained, pretrained.backbone, split
        self.wanted, self.config, self.root = wanted, config, root
        self.dtype = DTYPES[config.dtype]
        self.plan = plan_shards(split.lengths.numpy(), config.shard_inputs)
        self.ingredients = {
            "format": FORMAT,
            "backbone": backbone_digest(self.backbone),
            "tokens": tokens_digest(split),
            "shard_inputs": config.shard_inputs,
        }
        self.key = combine(self.ingredients)
        self.place = root.child(self.key)

    def open(self) -> FeatureStore:
        """The store, complete as far as the budget goes."""
        teacher, layers = self._shards("teacher"), {layer: self._layer(layer) for layer in self.wanted}
        if all(shards.complete() for shards in (teacher, *layers.values())):
            return self._opened(teacher, layers)
        self.root.create()
        with self.root.exclusive(f"{self.key}.lock") as alive:
            # Another process may have written since.
            teacher = self._shards("teacher")
            layers = self._affordable({layer: self._layer(layer) for layer in self.wanted})
            self._complete(teacher, layers, alive)
        return self._opened(teacher, layers)

    def _opened(self, teacher: ShardSet, layers: dict[int, ShardSet]) -> FeatureStore:
        store = FeatureStore(self.key, self.wanted, self.split, self.pretrained, teacher, layers, self.plan, self.dtype)
        store.check()
        return store

    def _shards(self, name: str) -> ShardSet:
        return ShardSet(self.place.child(name), [len(rows) for rows in self.plan])

    def _layer(self, layer: int) -> ShardSet:
        return self._shards(layer_folder(layer, self.config.dtype))

    def _affordable(self, layers: dict[int, ShardSet]) -> dict[int, ShardSet]:
        """The layers to store: all, or those that are there already."""
        complete = {layer: shards for layer, shards in layers.items() if shards.complete()}
        missing = sorted(set(layers) - set(complete))
        if not missing:
            return layers
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
        used, free = self.place.size(), self.root.free()
        kept = used - sum(layers[layer].place.size() for layer in missing)
        needed = max(kept, size.teacher) + size.layer * len(missing)
        limit = None
        if needed > self.config.budget_gb * GIGABYTE:
            limit = f"budget_gb = {self.config.budget_gb:g}"
        elif free is not None and needed > used + free:
            limit = f"the {(used + free) / GIGABYTE:.3g} GB that the disk has for them"
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
        return layers

    def _probe(self) -> HiddenState:
        with torch.inference_mode():
            return self.backbone.embed(self.split.batch([0], self.backbone.device))

    def _complete(self, teacher: ShardSet, layers: dict[int, ShardSet], alive: Callable[[], None]) -> None:
        self._describe()
        for shards in (teacher, *layers.values()):
            shards.place.create()
            shards.place.sweep()
        write_features(self.backbone, self.split, self.plan, teacher, layers, self.dtype, self.config.batch_size, alive)
        for layer, shards in layers.items():
            if "precision" not in shards.notes:
                precision = measure_precision(
                    self.backbone, self.split, layer, self.dtype, PRECISION_INPUTS, self.config.batch_size
                )
                shards.notes["precision"] = asdict(precision)
                _log.info("layer %d in %s: %s", layer, self.config.dtype, precision)
            shards.save()
        teacher.save()

    def _describe(self) -> None:
        self.place.create()
        self.place.sweep()
        if not read_json(self.place, META):
            content = {
                "ingredients": self.ingredients,
                "backbone": self.pretrained.identity,
                "inputs": len(self.split),
                "tokens": int(self.split.lengths.sum()),
                "longest": int(self.split.lengths.max()),
            }
            write_json(self.place, META, content)


def layer_folder(layer: int, dtype: str) -> str:
    """Name of the folder of one layer's states."""
    return f"layer-{layer:03d}-{dtype}"
