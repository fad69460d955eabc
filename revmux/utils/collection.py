"""Python's collector of cyclic garbage, in processes that only run our own code."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Let Python look for cycles after 50,000 new objects instead of 700.

    Importing torch, transformers and Ray makes half a million objects that stay. By default Python searches all of them
    several times meanwhile, which takes a fifth of the time until a worker can start.
    """
    gc.set_threshold(50_000)
