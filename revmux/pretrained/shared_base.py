"""Base models and tokenizers that task models of one process share, so that each is loaded once.

Both are found by the content of their files. They stay as long as a task model uses them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from revmux.backbone.joint_layers import JointLayers
from revmux.pretrained.location import CONFIG_NAME

_TOKENIZER_PATTERNS = ("token*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.model")
_TOKENIZER_SETTINGS = ("model_type", "tokenizer_class")
"""Settings of a model that decide which tokenizer is loaded."""


class SharedBase:
    """A frozen base model.

    Args:
        model: the model, with a head whose weights may be random.
        missing: names of the weights that its files do not contain.
    """

    def __init__(self, model: PreTrainedModel, missing: Sequence[str]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.missing = tuple(missing)

    @cached_property
    def joint_layers(self) -> JointLayers:
        """Its layers, for inputs of several models with low-rank updates. One thread at a time may run them."""
        return JointLayers(self.model)


class SharedBases:
    """The base models and tokenizers that are in use. Not for several threads at a time."""

    def __init__(self) -> None:
        self._bases: WeakValueDictionary[str, SharedBase] = WeakValueDictionary()
        self._tokenizers: WeakValueDictionary[str, PreTrainedTokenizerBase] = WeakValueDictionary()

    def base(self, about: Sequence[object], load: Callable[[], SharedBase]) -> SharedBase:
        """Return a base, which is loaded if no task model uses it.

        Args:
            about: what it depends on: the sha256 of its weights, its configuration and the options of loading.
            load: loads it.
        """
        key = repr(about)
        found = self._bases.get(key)
        if found is None:
            found = self._bases[key] = load()
        return found

    def tokenizer(self, folder: Path, load: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a folder, which is loaded if no task model uses an equal one."""
        key = tokenizer_files_digest(folder)
        found = self._tokenizers.get(key)
        if found is None:
            found = self._tokenizers[key] = load()
        return found


def tokenizer_files_digest(folder: Path) -> str:
    """A digest of everything in a folder that decides which tokenizer is loaded from it."""
    digest = hashlib.sha256()
    settings: dict[str, Any] = {}
    if (file := folder / CONFIG_NAME).is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    digest.update(repr([settings.get(name) for name in _TOKENIZER_SETTINGS]).encode())
    for found in sorted({found for pattern in _TOKENIZER_PATTERNS for found in folder.glob(pattern)}):
        if found.is_file():
            digest.update(f"{found.name} {found.stat().st_size}\n".encode())
            digest.update(found.read_bytes())
    return digest.hexdigest()
