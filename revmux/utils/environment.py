"""Environment variables that compute processes need before they start."""

from __future__ import annotations

import os

_MEMORY = {
    # Memory allocation dominates small batches on a CPU, so the process keeps freed memory.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}
_SHARED_CORES = {
    # A waiting OpenMP thread yields its core at once. By default it spins for a short time first, which is faster for a
    # model that has its cores to itself, above all in groups, whose upper layers are many short operations.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def compute_environment() -> dict[str, str]:
    """Variables for training and bulk workers, which have their cores to themselves. Values set in this process take
    precedence.
    """
    return _with_own_values(_MEMORY)


def replica_environment() -> dict[str, str]:
    """Variables for replicas, which share their cores with the threads and processes of the request path. Values set in
    this process take precedence.
    """
    return _with_own_values(_MEMORY | _SHARED_CORES)


def _with_own_values(defaults: dict[str, str]) -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
