"""The key of a store: a hash of everything that determines its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from revmux.backbone import Backbone
from revmux.backbone.decoder import DecoderBackbone

# Settings that do not change what a model computes.
_INERT = {
    "_name_or_path",
    "_attn_implementation",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
}


def backbone_digest(backbone: Backbone) -> str:
    """Hash of the weights in memory and of the configuration.

    A hash of the checkpoint file is not enough, since the head may be new, or the weights may have been tuned.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = {name: value for name, value in backbone.config.to_dict().items() if name not in _INERT}
    verbalizer = getattr(backbone, "verbalizer", None)  # label words are a head without weights
    settings = [type(backbone).__name__, config, str(verbalizer)]
    if isinstance(backbone, DecoderBackbone) and (backbone.constant_tokens or backbone.soft_prompt):
        settings.append(["without its constant prefix", *backbone.constant_tokens])
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def combine(ingredients: Mapping[str, Any]) -> str:
    """A hash of all ingredients that can serve as a folder name."""
    return hashlib.blake2b(json.dumps(ingredients, sort_keys=True).encode(), digest_size=12).hexdigest()
