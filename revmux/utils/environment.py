"""What processes that compute want in their environment before they start."""

from __future__ import annotations

import os

_WANTED = {
    # Small batches on a CPU are bound by allocation: keep freed memory in the process.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    # A thread that waits leaves the core to the process beside it.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def compute_environment() -> dict[str, str]:
    """Variables of memory and threads for training workers and replicas; what this process has of them is kept."""
    return {name: os.environ.get(name, value) for name, value in _WANTED.items()}
