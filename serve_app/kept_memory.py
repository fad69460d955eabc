"""What a task keeps in memory, as a line of the log and as part of ``/info``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from revmux.estimate.serving_memory import KeptMemory


def describe_memory(task: str, kept: KeptMemory, merge_limit_mib: int) -> str:
    """Describe on one line what a task keeps in memory.

    Args:
        task: the name of the task.
        kept: what it keeps.
        merge_limit_mib: the limit on a copy of the weights for LoRA, in MiB.
    """
    adapters = kept.adapters
    merged = f"{_mib(sum(adapter.merged for adapter in adapters))} merged LoRA"
    apart = [adapter.unmerged for adapter in adapters if adapter.unmerged]
    if apart:
        merged += (
            f" ({len(apart)} not merged: a copy takes up to {_mib(max(apart))} MiB, the limit is {merge_limit_mib})"
        )
    prefix = kept.prefix + sum(adapter.prefix for adapter in adapters)
    return (
        f"task {task!r} keeps {_mib(kept.total)} MiB in memory: {_mib(kept.backbone)} model, "
        f"{_mib(sum(adapter.weights for adapter in adapters))} adapters, {merged}, {_mib(prefix)} constant prefix"
    )


def memory_info(kept: KeptMemory) -> dict[str, Any]:
    """The same in bytes, with the total, for ``/info``."""
    return {"total": kept.total, **asdict(kept)}


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
