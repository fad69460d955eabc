"""A trial that Ray's memory monitor ends is lost like any other. Ray Tune knows no such end, and would end the sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError


@contextmanager
def trials_may_be_ended() -> Iterator[None]:
    """Within, Tune takes the memory monitor's error for that of a lost process, which the trial goes on from."""
    whole = RayActorManager._actor_task_failed

    def told(manager: RayActorManager, tracked_actor_task: object, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        whole(manager, tracked_actor_task=tracked_actor_task, exception=exception)

    RayActorManager._actor_task_failed = told
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = whole
