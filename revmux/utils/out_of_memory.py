"""What to do where a device, or the machine, has too little memory."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, lacks the memory that was asked for."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )


def release_memory(device: torch.device) -> None:
    """Return what a failed pass held on a device, so that a smaller one may succeed."""
    gc.collect()  # an exception and its frames may refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
