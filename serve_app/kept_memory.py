"""What the tasks of a replica keep in memory: counted, as lines of the log, and as part of ``/info``."""

from __future__ import annotations

from array import array
from dataclasses import asdict
from typing import Any

from torch import UntypedStorage

from revmux.estimate.peak import StorageCounter
from revmux.estimate.serving_memory import KeptMemory, kept_memory
from revmux.serving.task import Task


class MemoryCount:
    """Counts what the loaded tasks keep in memory. Memory that several tasks use counts once.

    The time to add or remove a task does not depend on the number of others.

    Attributes:
        total: what all tasks keep, in bytes.
        added: what each task added to what the tasks before it kept.
    """

    def __init__(self) -> None:
        self.total = 0
        self.added: dict[str, KeptMemory] = {}
        self._users: dict[int, int] = {}  # number of tasks by address of the storage
        self._storages: dict[int, UntypedStorage] = {}
        self._used: dict[str, array[int]] = {}  # addresses by task

    def add(self, task: Task) -> KeptMemory:
        """Count a task, and return what it adds."""
        counter = StorageCounter(self._users)
        kept = kept_memory(task.backbone, [adapter.model for adapter in task.lineup.adapters], counter)
        for address, storage in counter.found.items():
            self._users[address] = self._users.get(address, 0) + 1
            self._storages.setdefault(address, storage)
        self._used[task.name] = array("Q", counter.found)
        self.added[task.name] = kept
        self.total += kept.total
        return kept

    def remove(self, name: str) -> None:
        """Stop counting a task."""
        del self.added[name]
        for address in self._used.pop(name):
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                self.total -= self._storages.pop(address).nbytes()


def describe_memory(task: str, kept: KeptMemory, merge_limit_mib: int) -> str:
    """Describe on one line what a task keeps in memory.

    Args:
        task: the name of the task.
        kept: what it keeps that no task before it keeps.
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
