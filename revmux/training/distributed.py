"""Communication between the workers of a run. Outside a torch.distributed group, a process is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from revmux.errors import UserError

Value = TypeVar("Value")


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and the number of workers; 0 and 1 outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shares(total: int, world: int) -> list[int]:
    """How many of ``total`` items each of ``world`` workers has, in the order of their ranks; they differ by at most one."""
    least, more = divmod(total, world)
    return [least + (rank < more) for rank in range(world)]


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean over all workers of a tensor of the same shape on each."""
    _, world = rank_and_world()
    if world > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world
    return values


def from_first(value: Value) -> Value:
    """Broadcast the value of rank 0 to every worker; the values of the other workers are ignored."""
    _, world = rank_and_world()
    if world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors on every worker with those of rank 0."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


@contextmanager
def fail_together() -> Iterator[None]:
    """Run local work on every worker; if it raises a UserError on one worker, raise the same error on all.

    This keeps the other workers from waiting for the failed one. Every worker must enter the block, and the block must
    not contain collective operations.

    Raises:
        UserError: the error of the lowest rank that raised one.
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
