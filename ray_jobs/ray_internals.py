"""The one file that relies on parts of Ray that Ray does not document; each has a test in tests/test_ray_internals.py.

Ray may change any of them without notice. When Ray's version changes, run those tests first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
    from ray.train.v2._internal.execution.callback import ControllerCallback

__all__ = ["ControllerCallback"]

_RUNNING_STATE = "RunningState"
_HEALTH_CHECK_ERROR = "WorkerHealthCheckFailedError"
_TOO_SMALL_ERROR = "InsufficientClusterResourcesError"
_FAILURE_MARK = "Failure #"
_MEMORY_MONITOR_TEXT = "node running low on memory"
_DEAD_ACTOR_TEXT = "The actor died"


def __getattr__(name: str) -> Any:
    """Import Ray only where its callback class is used.

    ``UserCallback``, the public class, is not called before the workers start and cannot end a run that waits.
    """
    if name == "ControllerCallback":
        from ray.train.v2._internal.execution.callback import ControllerCallback

        return ControllerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def in_submitted_job() -> bool:
    """Whether this process is the driver of a job that ``ray job submit`` started.

    A flag of our own would have to be given by the person whose forgotten absolute path this check is for.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def workers_are_running(state: object) -> bool:
    """Whether a state of Ray Train's controller means that all workers have started.

    Args:
        state: as a :class:`ControllerCallback` receives it.
    """
    return type(state).__name__ == _RUNNING_STATE


def unwrap_health_check(error: Exception) -> Exception:
    """The error behind a failed health check of a Ray Train worker; any other error as it is."""
    if type(error).__name__ != _HEALTH_CHECK_ERROR:
        return error
    failure: Exception = error.health_check_failure  # type: ignore[attr-defined]
    return failure


def is_cluster_too_small(error: BaseException) -> bool:
    """Whether Ray Train gave up because the cluster can never hold a worker."""
    return type(error).__name__ == _TOO_SMALL_ERROR


def trial_stop_check() -> Callable[[], bool]:
    """A function that says whether Ray Tune is stopping the trial that this process runs.

    The public way is a ``Trainable`` class, whose ``step`` would need a thread of its own around the whole run.
    Call this on the trial's thread; the function itself works on any thread.
    """
    from ray.train._internal.session import get_session

    session = get_session()
    assert session is not None
    return session.stop_event.is_set


@contextmanager
def out_of_memory_trials_are_retried() -> Iterator[None]:
    """Within, a trial that Ray's memory monitor ends is retried like one whose process was lost.

    Ray Tune does not handle the memory monitor's error and would end the whole sweep.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    original = RayActorManager._actor_task_failed

    def retried(manager: RayActorManager, tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(manager, tracked_actor_task=tracked_actor_task, exception=exception)

    RayActorManager._actor_task_failed = retried  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original  # type: ignore[method-assign]


def last_error(error_file: str) -> str:
    """The newest entry of the error file that Ray Tune keeps of a trial.

    Args:
        error_file: its whole text.
    """
    return error_file.rpartition(_FAILURE_MARK)[2]


def ended_by_memory_monitor(error: str) -> bool:
    """Whether an error's text says that Ray's memory monitor ended the process."""
    return _MEMORY_MONITOR_TEXT in error


def process_was_lost(error: str) -> bool:
    """Whether an error's text says that an actor's process ended without an exception of its own."""
    return _DEAD_ACTOR_TEXT in error


@contextmanager
def worker_lines_filtered(is_hidden: Callable[[Mapping[str, Any], str], bool], log: IO[str]) -> Iterator[None]:
    """Within, some of the lines that processes of the cluster print go to a file and not to this process's output.

    Ray can show all such lines or none.

    Args:
        is_hidden: takes the process (``pid``, ``actor_name``) and a line; whether the line goes to the file.
        log: the file.
    """
    from ray._private import worker

    original = worker.print_worker_logs

    def split(data: dict[str, Any], print_file: Any, ignore_prefix: bool = False) -> None:
        lines: list[str] = data.get("lines", [])
        hidden = [line for line in lines if is_hidden(data, line)]
        for line in hidden:
            print(f"({data.get('actor_name') or ''} pid={data.get('pid')}) {line}", file=log)
        shown = [line for line in lines if line not in hidden]
        if shown:
            original(data | {"lines": shown}, print_file, ignore_prefix)

    worker.print_worker_logs = split
    try:
        yield
    finally:
        worker.print_worker_logs = original
