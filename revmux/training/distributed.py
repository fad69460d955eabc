"""What the processes of a run say to each other. Outside a torch.distributed group a process is alone: rank 0 of 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from revmux.errors import UserError

Value = TypeVar("Value")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of workers; 0 and 1 outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean over all workers of a tensor that each has in the same shape."""
    _, world = rank_and_world()
    if world > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world
    return values


def from_first(value: Value) -> Value:
    """What rank 0 has, on every worker; the other workers' values do not count."""
    _, world = rank_and_world()
    if world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def together() -> Iterator[None]:
    """Work that a worker does on its own: where one fails by a mistake or a full disk, all fail alike.

    No worker then waits for one that has given up. Every worker must enter; none may meet the others inside.

    Raises:
        UserError: of the lowest rank that raised one.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    _, world = rank_and_world()
    messages = [None if failure is None else str(failure)]
    if world > 1:
        gathered: list[str | None] = [None] * world
        dist.all_gather_object(gathered, messages[0])
        messages = gathered
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise UserError(first) from failure
