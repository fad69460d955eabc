"""The only module of the jobs that uses undocumented parts of Ray. Each use has a test in tests/test_ray_internals.py.

Ray may change these parts without notice. Run those tests first after an upgrade of Ray.
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
_LOST_ACTOR_TEXTS = ("The actor died", "may not have been executed on the actor")  # the second if its machine is lost
_HEAD_RESOURCE = "node:__internal_head__"
_ADDRESS = "RAY_ADDRESS"


def __getattr__(name: str) -> Any:
    """Import Ray only when its callback class is used.

    Ray Train does not call the public class ``UserCallback`` before the workers start, so it cannot end a waiting run.
    """
    if name == "ControllerCallback":
        from ray.train.v2._internal.execution.callback import ControllerCallback

        return ControllerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def in_submitted_job() -> bool:
    """Whether this process is the driver of a job that ``ray job submit`` started.

    A flag would not help: a user who forgets to give an absolute path would also forget the flag.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_head(node: Mapping[str, Any]) -> bool:
    """Whether a node is the head of its cluster.

    Args:
        node: as ``ray.nodes()`` describes it.
    """
    return _HEAD_RESOURCE in node["Resources"]


def workers_are_running(state: object) -> bool:
    """Whether a state of Ray Train's controller means that all workers have started.

    Args:
        state: as a :class:`ControllerCallback` receives it.
    """
    return type(state).__name__ == _RUNNING_STATE


def unwrap_health_check(error: Exception) -> Exception:
    """The error behind a failed health check of a Ray Train worker; any other error unchanged."""
    if type(error).__name__ != _HEALTH_CHECK_ERROR:
        return error
    failure: Exception = error.health_check_failure  # type: ignore[attr-defined]
    return failure


def is_cluster_too_small(error: BaseException) -> bool:
    """Whether Ray Train gave up because no machine of the cluster can ever fit a worker."""
    return type(error).__name__ == _TOO_SMALL_ERROR


@contextmanager
def controllers_know_their_cluster() -> Iterator[None]:
    """Inside the context, Ray Train passes the address of this process's cluster to the controllers that it starts.

    The helper that frees the workers of a lost controller looks for the cluster on its machine. If there are several, it
    ends with an error, and the workers' resources stay reserved.
    """
    import ray
    from ray.train.v2._internal import constants

    constants.ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    former = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if former is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = former


def trial_stop_check() -> Callable[[], bool]:
    """Return a function that returns whether Ray Tune is stopping the trial of this process.

    The public way is a ``Trainable`` class, whose ``step`` would need a separate thread for the whole run.
    Call this on the trial's thread; the returned function works on any thread.
    """
    from ray.train._internal.session import get_session

    session = get_session()
    assert session is not None
    return session.stop_event.is_set


@contextmanager
def retry_out_of_memory_trials() -> Iterator[None]:
    """Inside the context, retry a trial that Ray's memory monitor ends, as if its process had been lost.

    Otherwise Ray Tune does not handle the memory monitor's error, and the whole sweep fails.
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


def forget_failures(trial: Any) -> None:
    """Start Ray Tune's count of a trial's failures again, which it compares with ``max_failures``.

    Args:
        trial: as a Tune callback receives it.
    """
    trial.run_metadata.num_failures = 0


def last_error(error_file: str) -> str:
    """The newest entry of the error file that Ray Tune writes for a trial.

    Args:
        error_file: the whole text of the file.
    """
    return error_file.rpartition(_FAILURE_MARK)[2]


def ended_by_memory_monitor(error: str) -> bool:
    """Whether an error text reports that Ray's memory monitor ended the process."""
    return _MEMORY_MONITOR_TEXT in error


def process_was_lost(error: str) -> bool:
    """Whether an error text reports that an actor's process ended without raising an exception."""
    return any(text in error for text in _LOST_ACTOR_TEXTS)


@contextmanager
def filter_worker_lines(is_hidden: Callable[[Mapping[str, Any], str], bool], log: IO[str]) -> Iterator[None]:
    """Inside the context, write selected lines that the cluster's processes print to a file instead of the output.

    Ray itself can only show all such lines or none.

    Args:
        is_hidden: called with the process (``pid``, ``actor_name``) and a line; returns whether to write it to the file.
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
