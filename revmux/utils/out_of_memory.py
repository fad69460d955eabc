"""Detection of and recovery from out-of-memory errors."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that a device or the machine is out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )


def release_memory(device: torch.device) -> None:
    """Free the memory that a failed forward pass held, so that a smaller batch may succeed."""
    gc.collect()  # an exception and its frames may refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
