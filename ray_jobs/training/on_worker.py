"""Run a function in a process that has the resources of a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ray_jobs.cluster import ClusterConfig
from revmux.errors import UserError

T = TypeVar("T")


def run_on_worker(title: str, cluster: ClusterConfig, function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns on a machine with room for a worker. Waits for that machine.

    Args:
        title: what waits, for messages: ``the plan``.
        cluster: resources and placement of the worker; already connected.
        function: runs there, with as many CPU threads as the worker has cores.
        arguments: its arguments.

    Raises:
        UserError: the function has raised it, or the cluster has been too small for a worker for too long.
    """
    import ray
    from ray.exceptions import RayTaskError

    from ray_jobs.training.resource_wait import wait_for_resources

    wait_for_resources(title, cluster)
    remote: Any = ray.remote(**cluster.remote_options)(_run)
    threads = max(1, int(cluster.cpus_per_worker))
    try:
        result: T = ray.get(remote.remote(threads, function, arguments))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None  # without the worker's traceback
        raise
    return result


def _run(threads: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    torch.set_num_threads(threads)
    return function(*arguments)
