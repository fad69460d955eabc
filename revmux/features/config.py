"""Where and how features are stored."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

import torch

from revmux.errors import UserError, one_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def default_root() -> str:
    """``revmux/features`` in the user's cache folder, as XDG_CACHE_HOME names it."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "revmux", "features")


@dataclass(frozen=True)
class StoreConfig:
    """Where and how features are stored.

    Args:
        root: folder of all stores: a local path, or a URI that pyarrow opens, such as ``s3://bucket/features``. On
            several machines, all of them must reach it. By default ``features`` in the storage folder of the job, and
            ``revmux/features`` in the user's cache for programs that have no storage folder.
        copies: local folder that shards of a URI's store are copied to when they are read, to be memory-mapped from
            there; by default the user's cache.
        dtype: type of the states on disk; what it loses is measured and noted in the store.
        budget_gb: most gigabytes (10^9 bytes) that one split's store may take on disk. Beyond it only the
            teacher is stored, and the prefill is computed online. 0 always does so.
        batch_size: inputs a forward pass while the store is filled.
        shard_inputs: most inputs in a file.
    """

    root: str | None = None
    copies: str = field(default_factory=default_root)
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    budget_gb: float = 10.0
    batch_size: int = 64
    shard_inputs: int = 2048

    def __post_init__(self) -> None:
        for name in ("root", "copies"):
            if getattr(self, name) == "":
                raise UserError(f"{name} of the feature store is empty; name a folder")
        if "://" in self.copies:
            raise UserError(f"copies is {self.copies!r}; name a folder of this machine: files are mapped from there")
        if self.dtype not in DTYPES:
            raise one_of("dtype", self.dtype, DTYPES, "choose float16 for the smallest error at half the size")
        if not self.budget_gb >= 0:
            raise UserError(f"budget_gb is {self.budget_gb}; choose 0 (teacher only) or more gigabytes, such as 10")
        for name in ("batch_size", "shard_inputs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
