"""Listing and removal of the stores in the feature cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyarrow.fs import FileSystem

from revmux.errors import UserError
from revmux.features.budget import GIGABYTE
from revmux.features.config import default_root
from revmux.features.precision import Precision, noted_precision
from revmux.features.shards import META, read_notes, read_object
from revmux.utils.place import Place


@dataclass(frozen=True)
class StoreInfo:
    """One store.

    Attributes:
        key: name of its folder.
        backbone: name of the model.
        inputs: inputs of the split.
        tokens: tokens of the split.
        contents: what is stored: ``tokens``, or features such as ``teacher`` and ``layer-003-float16``.
        losses: the precision loss of each layer whose type on disk is narrower than the backbone's.
        bytes: size on disk.
    """

    key: str
    backbone: str
    inputs: int
    tokens: int
    contents: tuple[str, ...]
    losses: tuple[tuple[str, Precision], ...]
    bytes: int


def list_stores(root: str | None = None, filesystem: FileSystem | None = None) -> list[StoreInfo]:
    """All stores under a root, the largest first.

    Args:
        root: folder or URI of the stores. By default, the user's cache.
        filesystem: the filesystem of the path ``root``. By default, the local disk.
    """
    place = Place.open(root or default_root(), filesystem)
    stores = []
    for key in place.folders():
        store = place.child(key)
        meta = read_object(store, META)
        if meta:
            contents = tuple(store.folders())
            noted = ((name, noted_precision(read_notes(store.child(name)))) for name in contents)
            losses = tuple((name, loss) for name, loss in noted if loss is not None)
            backbone = str(meta["backbone"]["name"])
            stores.append(StoreInfo(key, backbone, meta["inputs"], meta["tokens"], contents, losses, store.size()))
    return sorted(stores, key=lambda store: -store.bytes)


def remove_stores(
    keys: Sequence[str], root: str | None = None, everything: bool = False, filesystem: FileSystem | None = None
) -> list[StoreInfo]:
    """Remove stores. No other files are removed.

    Args:
        keys: keys of stores, or unique prefixes of keys.
        root: folder or URI of the stores. By default, the user's cache.
        everything: whether to remove all stores, regardless of ``keys``.
        filesystem: the filesystem of the path ``root``. By default, the local disk.

    Returns:
        The removed stores.

    Raises:
        UserError: a key matches no store or several stores, there is no key, or another process is writing a store.
    """
    stores = list_stores(root, filesystem)
    if not keys and not everything:
        raise UserError("no store named; give keys as `revmux cache ls` shows them")
    chosen = stores if everything else list(dict.fromkeys(_find(key, stores) for key in keys))
    place = Place.open(root or default_root(), filesystem)
    for store in chosen:
        with place.exclusive(f"{store.key}.lock", wait=False):
            place.remove(store.key)
    return chosen


def ls(root: str | None = None) -> str:
    """List the feature stores, the largest first.

    Args:
        root: folder or URI of the stores. By default, the user's cache.
    """
    return format_stores(list_stores(root))


def rm(key: str, root: str | None = None) -> str:
    """Remove a feature store.

    Args:
        key: the store's key, or a unique prefix of it. ``all`` removes every store.
        root: folder or URI of the stores. By default, the user's cache.
    """
    removed = remove_stores([] if key == "all" else [key], root, everything=key == "all")
    return "removed:\n" + format_stores(removed)


def format_stores(stores: Sequence[StoreInfo]) -> str:
    """A table of stores and their total."""
    lines = [f"{'KEY':<24}  {'GB':>8}  {'INPUTS':>9}  {'TOKENS':>11}  BACKBONE  CONTENTS"]
    for store in stores:
        size = store.bytes / GIGABYTE
        lines.append(
            f"{store.key:<24}  {size:>8.3f}  {store.inputs:>9}  {store.tokens:>11}  {store.backbone}  "
            f"{', '.join(store.contents)}"
        )
        lines += [f"  {name}: {loss}" for name, loss in store.losses]
    total = sum(store.bytes for store in stores) / GIGABYTE
    return "\n".join([*lines, f"{len(stores)} stores, {total:.3f} GB"])


def _find(key: str, stores: Sequence[StoreInfo]) -> StoreInfo:
    fitting = [store for store in stores if key and store.key.startswith(key)]
    if len(fitting) != 1:
        known = ", ".join(store.key for store in fitting or stores) or "none"
        problem = "fits several stores" if fitting else "fits no store"
        raise UserError(f"key {key!r} {problem}; known: {known}; give more of the key")
    return fitting[0]
