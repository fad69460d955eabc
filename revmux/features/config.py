"""Where and how features are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from revmux.errors import UserError, one_of
from revmux.utils.files import user_cache

StoredDtype = Literal["float32", "float16", "bfloat16"]


def default_root() -> str:
    """The folder of all feature stores in the user's cache folder."""
    return user_cache("features")


@dataclass(frozen=True)
class StoreConfig:
    """Where and how features are stored.

    Args:
        root: Folder of all feature stores: a local path, or a URI that pyarrow can open, such as s3://bucket/features.
            With several machines, all of them must be able to reach it. Default: features in the job's storage folder,
            or revmux/features in the user's cache folder for programs that have no storage folder.
        copies: Local folder for copies of shards that are read from a URI. They are memory-mapped from there.
        dtype: Data type of the stored states. The loss of precision is measured and recorded in the store.
        budget_gb: Maximum size of one split's features on disk, in gigabytes (10^9 bytes), including the teacher's
            outputs. If the states do not fit, only the teacher's outputs are stored, and the prefill is computed
            online. If these do not fit either, they are also computed online. 0 stores nothing.
        batch_size: Inputs per forward pass while the store is filled. At least 1.
        shard_inputs: Maximum number of inputs per file. At least 1. Default: files of at least 256 MB, or a sixteenth of the
            inputs if that is less.
    """

    root: str | None = None
    copies: str = field(default_factory=default_root)
    dtype: StoredDtype = "float16"
    budget_gb: float = 10.0
    batch_size: int = 64
    shard_inputs: int | None = None

    def __post_init__(self) -> None:
        for name in ("root", "copies"):
            if getattr(self, name) == "":
                raise UserError(f"{name} of the feature store is empty; name a folder")
        if "://" in self.copies:
            raise UserError(
                f"copies is {self.copies!r}; name a folder on this machine: files are memory-mapped from there"
            )
        if self.dtype not in get_args(StoredDtype):
            raise one_of(
                "dtype", self.dtype, get_args(StoredDtype), "choose float16 for the smallest error at half the size"
            )
        if not self.budget_gb >= 0:
            raise UserError(f"budget_gb is {self.budget_gb}; choose 0 (store nothing) or more gigabytes, such as 10")
        for name in ("batch_size", "shard_inputs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more")
