"""The tokens of a task on disk: written once by one process, and memory-mapped by all others.

A split's folder has the shards of its tokens, a file with the number of tokens of each input, a file with the labels, and
``meta.json``, which is written last and names all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from pyarrow.fs import FileSystem
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from revmux.data.blocks import blocks
from revmux.data.content import content_digest
from revmux.data.prompt import Prompt
from revmux.data.task import TaskData
from revmux.data.tokens import SplitTokens, TokenBlock, TokenDigest, token_blocks
from revmux.errors import UserError
from revmux.features.config import StoreConfig, default_root
from revmux.features.key import combine
from revmux.features.reader import StoredColumns, as_rows
from revmux.features.shards import (
    FORMAT,
    META,
    SHARD_BYTES,
    Layout,
    ShardSet,
    ShardWriter,
    ragged_column,
    read_object,
    write_object,
)
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_tokenizer
from revmux.utils.place import Place

SPLITS = ("train", "selection", "test")
PART_BLOCKS = 4
"""Blocks of :data:`revmux.data.tokens.TEXTS_AT_ONCE` inputs per part of a shard."""
_BYTES = {"attention_mask": np.uint8, "token_type_ids": np.uint8}
"""Columns whose values fit into a byte."""


class StoredTokens(SplitTokens):
    """The tokens of a split, memory-mapped. Pickling keeps only the location.

    Args:
        root: folder of all stores.
        key: key of the tokens.
        tokenizer: pads batches.
        copies: local folder for copies of remote files; None if ``root`` is local.

    Raises:
        UserError: the tokens are missing or incomplete.
    """

    def __init__(self, root: Place, key: str, tokenizer: PreTrainedTokenizerBase, copies: Place | None) -> None:
        self.key, self.tokenizer = key, tokenizer
        self._arguments = (root, key, tokenizer, copies)
        place = root.child(key)
        meta = _complete(place)
        if not meta:
            raise UserError(f"{place.path} contains no complete tokens; start again to write them")
        self._digest: str = meta["digest"]
        self.truncated: int = meta["truncated"]
        own = None if copies is None else copies.child(key)
        if own is not None:
            own.create()
            if not read_object(own, META):
                write_object(own, META, meta)  # copies are listed and removed like stores
        self.lengths, self.labels = (
            _mapped(place, own, meta["files"][name], meta["inputs"]) for name in ("lengths", "labels")
        )
        layout = Layout(np.array(meta["parts"]), np.array(meta["shards"]))
        shards = ShardSet(place.child("tokens"), len(layout), None if own is None else own.child("tokens"))
        shards.names = dict(enumerate(meta["names"]))
        self._columns, self._names = StoredColumns(shards, layout), list(meta["columns"])
        for values in (self.lengths, self.labels):
            self._columns.pages.add(pa.foreign_buffer(values.data_ptr(), values.nbytes, values))

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTokens, self._arguments

    @property
    def digest(self) -> str:
        """See :attr:`revmux.data.tokens.SplitTokens.digest`."""
        return self._digest

    def ragged(self, rows: Sequence[int] | Tensor) -> dict[str, list[list[int]]]:
        """See :meth:`revmux.data.tokens.SplitTokens.ragged`."""
        picked = as_rows(rows)
        found: dict[str, list[list[int]]] = {name: [] for name in self._names}
        for name, lists in found.items():
            for values in self._columns.ragged(name, picked):
                lists.append(values.tolist())
                self._columns.pages.touch(
                    1, values.nbytes
                )  # so that a large batch keeps no more pages than a small one
        return found


def store_tokens(
    split: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt: Prompt | None = None,
    config: StoreConfig | None = None,
    name: str = "",
    filesystem: FileSystem | None = None,
) -> StoredTokens:
    """Tokenize a split into a store, unless its tokens are stored already.

    If several processes need the same tokens at once, one of them writes and the others wait.

    Args:
        split: see :class:`revmux.data.tokens.TokenizedSplit`. It is read block by block.
        tokenizer: the backbone's tokenizer.
        max_length: maximum number of tokens per input.
        prompt: the template around each input, or None.
        config: location of the store.
        name: name of the backbone, for lists of stores.
        filesystem: the filesystem of the path ``config.root``. By default, the local disk.

    Raises:
        UserError: the split is empty, the template does not fit the inputs, or the store cannot be written.
    """
    if not len(split):
        raise UserError("the split is empty; provide at least one example")
    config = config or StoreConfig()
    ingredients = {
        "format": FORMAT,
        "texts": content_digest(split),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "prompt": None if prompt is None else [prompt.template, prompt.pair_template, prompt.chat],
    }
    key = combine(ingredients)
    root = Place.open(config.root or default_root(), filesystem)
    place = root.child(key)
    if not _complete(place):
        root.create()
        with root.exclusive(f"{key}.lock"):
            if not _complete(place):  # another process may have written it
                place.child("tokens").create()
                place.sweep()
                place.child("tokens").sweep()
                meta = _write(place, split, tokenizer, max_length, prompt)
                write_object(place, META, {"ingredients": ingredients, "backbone": {"name": name}, **meta})
    return open_tokens(key, tokenizer, config, filesystem)


def open_tokens(
    key: str, tokenizer: PreTrainedTokenizerBase, config: StoreConfig, filesystem: FileSystem | None = None
) -> StoredTokens:
    """Open stored tokens.

    Args:
        key: key of the tokens.
        tokenizer: pads batches.
        config: location of the store.
        filesystem: see :func:`store_tokens`.

    Raises:
        UserError: the tokens are missing or incomplete.
    """
    root = Place.open(config.root or default_root(), filesystem)
    return StoredTokens(root, key, tokenizer, None if root.local else Place.open(config.copies))


@dataclass(frozen=True)
class TokenizedTask:
    """A task whose tokens are stored: all that a worker needs, without the texts.

    Attributes:
        label_names: class names in the order of the integer labels.
        identity: see :class:`revmux.data.task.TaskData`.
        is_pair: whether every input is a pair of texts.
        keys: key of the tokens of each split.
    """

    label_names: list[str]
    identity: dict[str, Any]
    is_pair: bool
    keys: dict[str, str]

    def open(self, split: str, tokenizer: PreTrainedTokenizerBase, config: StoreConfig) -> StoredTokens:
        """Open the tokens of a split.

        Raises:
            UserError: see :func:`open_tokens`.
        """
        return open_tokens(self.keys[split], tokenizer, config)


def tokenize_task(
    task: TaskData, backbone: BackboneConfig, config: StoreConfig, splits: Sequence[str] = SPLITS
) -> TokenizedTask:
    """Store the tokens of a task's splits. The weights of the model are not loaded.

    Args:
        task: the texts.
        backbone: the model and its settings.
        config: location of the store.
        splits: the splits that are needed.

    Raises:
        UserError: see :func:`store_tokens`.
    """
    tokenizer, prompt = load_tokenizer(backbone, task.label_names)
    keys = {
        split: store_tokens(
            getattr(task, split), tokenizer, backbone.max_length, prompt, config, Path(backbone.model).name
        ).key
        for split in splits
    }
    return TokenizedTask(task.label_names, task.identity, task.is_pair, keys)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines the tokens of a text."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        rules: Any = [sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    else:
        rules = json.loads(core.to_str())
        for setting in ("truncation", "padding"):  # those of the last call
            rules.pop(setting, None)
    settings = [
        type(tokenizer).__name__,
        rules,
        tokenizer.padding_side,
        tokenizer.pad_token_id,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
        tokenizer.chat_template,
    ]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _write(
    place: Place, split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: Prompt | None
) -> dict[str, Any]:
    """Write the files of a split block by block; returns what ``meta.json`` says about them."""
    digest, shards = TokenDigest(tokenizer), _GrowingShards(place.child("tokens"))
    kinds: dict[str, Any] = {"input_ids": np.uint16 if len(tokenizer) <= 2**16 else np.int32} | _BYTES
    counts, files = {"inputs": 0, "tokens": 0, "longest": 0, "truncated": 0}, dict[str, str]()

    def named(name: str, kind: str) -> Callable[[str], str]:
        return lambda content: files.setdefault(name, f"{name}.{content}.{kind}")

    length_kind = _smallest(max_length)
    label_kind = _smallest(max(pc.max(block["label"]).as_py() for block in blocks(split.select_columns("label"))))
    with (
        place.writing("lengths", named("lengths", length_kind)) as lengths,
        place.writing("labels", named("labels", label_kind)) as labels,
        tqdm(total=len(split), desc="tokens", unit=" inputs", disable=None) as bar,
        shards,
    ):
        for found in _several(token_blocks(split, tokenizer, max_length, prompt), PART_BLOCKS):
            own = np.concatenate([block.lengths for block in found])
            columns = {name: np.concatenate([block.columns[name] for block in found]) for name in found[0].columns}
            digest.add(own, columns)
            lengths.write(own.astype(length_kind))
            labels.write(np.concatenate([block.labels for block in found]).astype(label_kind))
            shards.add(own, {name: values.astype(kinds.get(name, np.int32)) for name, values in columns.items()})
            counts["inputs"] += len(own)
            counts["tokens"] += int(own.sum())
            counts["longest"] = max(counts["longest"], int(own.max()))
            counts["truncated"] += sum(block.truncated for block in found)
            bar.update(len(own))
    return {
        **counts,
        "digest": digest.hexdigest(),
        "columns": list(columns),
        "files": files,
        "parts": shards.parts,
        "shards": shards.shards,
        "names": shards.names,
    }


def _complete(place: Place) -> dict[str, Any]:
    """The content of ``meta.json`` if all files that it names exist, otherwise empty."""
    meta = read_object(place, META)
    if not meta:
        return {}
    own, shards = set(place.files()), set(place.child("tokens").files())
    return meta if own.issuperset(meta["files"].values()) and shards.issuperset(meta["names"]) else {}


def _smallest(largest: int) -> str:
    """The type of a file whose numbers go from 0 to ``largest``."""
    return "int8" if largest < 2**7 else "int16" if largest < 2**15 else "int32"


class _GrowingShards:
    """Writes parts into shards of :data:`revmux.features.shards.SHARD_BYTES`; only the last may be smaller.

    Attributes:
        parts: see :class:`revmux.features.shards.Layout`.
        shards: see :class:`revmux.features.shards.Layout`.
    """

    def __init__(self, place: Place) -> None:
        self._set, self._open = ShardSet(place, 0), ExitStack()
        self._writer: ShardWriter | None = None
        self.parts, self.shards = [0], [0]

    @property
    def names(self) -> list[str]:
        """The file name of each shard."""
        return list(self._set.names.values())

    def add(self, lengths: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Write a part: tokens per input (R,), and each column (T,)."""
        if self._writer is None:
            self._writer = self._open.enter_context(self._set.writing(len(self.shards) - 1))
        counts = torch.from_numpy(lengths)
        self._writer.add({name: ragged_column(torch.from_numpy(values), counts) for name, values in columns.items()})
        self.parts.append(self.parts[-1] + len(lengths))
        if self._writer.sink.size >= SHARD_BYTES:
            self._end()

    def _end(self) -> None:
        self._open.close()
        self._writer = None
        self.shards.append(len(self.parts) - 1)

    def __enter__(self) -> None:
        """Enter the block within which parts are added."""

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._writer is not None:
            self._end()
        else:
            self._open.__exit__(*error)


def _several(blocks: Iterable[TokenBlock], count: int) -> Iterator[list[TokenBlock]]:
    """Consecutive blocks in lists of up to ``count``."""
    iterator = iter(blocks)
    while found := list(islice(iterator, count)):
        yield found


def _mapped(place: Place, copies: Place | None, name: str, size: int) -> Tensor:
    """A file of numbers as a memory-mapped tensor (size,); its type is the suffix of its name.

    Raises:
        UserError: the file is missing or damaged.
    """
    own, (_, digest, kind) = copies or place, name.split(".")
    if copies is not None and copies.digest(name) != digest:
        place.copy(name, copies)
    if own.digest(name) != digest:
        with suppress(FileNotFoundError):
            place.remove_file(name)
        raise UserError(f"{place.file(name)} was damaged and has been removed; start again to rewrite it")
    return torch.from_file(own.file(name), size=size, dtype=getattr(torch, kind))
