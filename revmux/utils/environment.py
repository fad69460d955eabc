"""Environment variables that compute processes need before they start."""

from __future__ import annotations

import os

_DEFAULTS = {
    # Memory allocation dominates small batches on a CPU, so the process keeps freed memory.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    # A waiting thread yields its core to other processes.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def compute_environment() -> dict[str, str]:
    """Memory and thread variables for training workers and replicas. Values set in this process take precedence."""
    return {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}
