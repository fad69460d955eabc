"""Failures of workers: report the original error, restart, and end a run if a restart cannot help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import ControllerError, UserCallback

from ray_jobs.ray_internals import is_cluster_too_small, unwrap_health_check
from revmux.errors import UserError
from revmux.utils.redact import without_passwords


class WorkerError(RuntimeError):
    """A worker failed and restarts did not help; the message contains the worker's rank and error."""


class RestartPolicy(UserCallback):
    """Ends a run as soon as one worker raises ``UserError``, or after too many other failures without a finished epoch.

    Ray Train polls the workers and calls this when one has failed. The other workers may be waiting for the failed one
    in a collective operation, whose time-out is half an hour. Ray Train stops them when this raises. Ray Train itself would
    count failures over the whole run, so a long run would not survive many losses of spot machines.

    Args:
        title: name of the run in printed lines.
        max_failures: number of restarts between two finished epochs. Those after a preemption do not count.
    """

    def __init__(self, title: str, max_failures: int) -> None:
        self.title, self.max_failures = title, max_failures
        self.failures = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Start the count again; Ray Train calls this when all workers have finished an epoch."""
        self.failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this on its controller before it restarts the workers.

        Raises:
            ControllerError: a :class:`UserError` is among the exceptions, or there were too many failures. Ray Train never
                retries after this error.
        """
        rank, error = first_error(worker_exceptions)
        if isinstance(error, UserError):
            raise ControllerError(error)
        failed = f"worker {rank} failed: {describe_error(error)}"
        print(f"{self.title}: {failed}", flush=True)
        self.failures += not any(was_preempted(each) for each in worker_exceptions.values())
        if self.failures > self.max_failures:
            raise ControllerError(WorkerError(failed))


def was_preempted(error: Exception) -> bool:
    """Whether a worker died because its machine was taken away with notice."""
    error = unwrap_health_check(error)
    return isinstance(error, RayActorError) and error.preempted


def first_error(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """The failure that caused the others, with its rank: a ``UserError`` if any, else one that is not a lost peer.

    Args:
        failures: exceptions by rank, at least one.
    """

    def order(rank: int) -> tuple[bool, bool, int]:
        error = failures[rank]
        return not isinstance(error, UserError), lost_a_peer(error), rank

    rank = min(failures, key=order)
    return rank, failures[rank]


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error only reports that another worker disappeared during a collective operation."""
    if isinstance(error, dist.DistError):
        return True
    pattern = r"\bgloo\b|connection (closed|reset|refused)"
    return isinstance(error, RuntimeError) and re.search(pattern, str(error), re.IGNORECASE) is not None


def describe_error(error: Exception) -> str:
    """An error's type and message on one line, without passwords."""
    error = unwrap_health_check(error)
    lines = [line.strip() for line in without_passwords(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def error_to_raise(failed: Exception) -> Exception:
    """The exception to raise for a failed Ray Train run.

    Args:
        failed: exception that ``fit`` raised.

    Returns:
        :class:`UserError` if the user has to fix something, :class:`WorkerError` if a worker failed, else ``failed``.
    """
    cause = failed.controller_failure if isinstance(failed, ControllerError) else failed
    if isinstance(cause, UserError):
        return UserError(str(cause))
    if isinstance(cause, WorkerError):
        return cause
    if is_cluster_too_small(cause):
        return UserError(" ".join(str(cause).split()))
    return failed
