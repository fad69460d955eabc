"""The most memory that a computation holds at the same time, counted on its tensors: real ones or fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from functools import partial
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Follows the tensors that operations create while it is active, each until nothing refers to it.

    Tensors that existed before are not counted, and neither are the buffers inside a kernel.

    Attributes:
        bytes: size of the tensors that are alive now.
        peak: size of the most that were alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # unannotated in torch
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = {storage._cdata for storage in _storages((args, kwargs))}
        output = function(*args, **(kwargs or {}))
        for storage in _storages(output):
            key = storage._cdata
            if key in read or key in self._alive:  # a view
                continue
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return output

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.bytes -= size


class StorageCounter:
    """Counts the bytes of tensors. Tensors that share memory count once.

    Args:
        elsewhere: addresses of storages that are counted elsewhere.

    Attributes:
        found: all storages of the tensors, by their address. The references keep it from being used again.
    """

    def __init__(self, elsewhere: Container[int] = ()) -> None:
        self.found: dict[int, UntypedStorage] = {}
        self._elsewhere = elsewhere

    def add(self, tensors: Iterable[Tensor]) -> int:
        """The bytes of those tensors whose memory no earlier tensor has."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.found:
                self.found[storage._cdata] = storage
                total += 0 if storage._cdata in self._elsewhere else storage.nbytes()
        return total


def _storages(values: Any) -> Iterable[UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
