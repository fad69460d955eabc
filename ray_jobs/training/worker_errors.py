"""When workers fail: the error that came first is told, and what starting again cannot mend ends the run at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from ray.train import ControllerError, UserCallback, WorkerGroupError

from ray_jobs.ray_internals import is_cluster_too_small, unwrap_health_check
from revmux.errors import UserError
from revmux.utils.redact import without_passwords


class WorkerError(RuntimeError):
    """A worker failed, and starting again did not help; the message names the worker and its own error."""


class StopOnMistake(UserCallback):
    """Ends a run as soon as one worker has met what a person has to mend, and tells why workers start again.

    Ray Train asks the workers how they are and calls this where one has failed. The others may still wait for that one,
    within a sum over workers, and would until its time-out of half an hour; Ray Train then stops them.

    Args:
        title: what is trained, in the words of the progress lines.
    """

    def __init__(self, title: str) -> None:
        self.title = title

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this on its controller before it decides whether the workers start again.

        Raises:
            ControllerError: a :class:`UserError` is among the exceptions; the one error that is never tried again.
        """
        rank, error = first_error(worker_exceptions)
        if isinstance(error, UserError):
            raise ControllerError(error)
        print(f"{self.title}: worker {rank} failed, {in_words(error)}", flush=True)


def first_error(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """The failure that the others follow from, with its rank: a mistake, else any but a peer that went away.

    Args:
        failures: by rank, at least one.
    """

    def order(rank: int) -> tuple[bool, bool, int]:
        error = failures[rank]
        return not isinstance(error, UserError), lost_a_peer(error), rank

    rank = min(failures, key=order)
    return rank, failures[rank]


def lost_a_peer(error: BaseException) -> bool:
    """Whether all that an error says is that another worker went away in the middle of what they do together."""
    if isinstance(error, dist.DistError):
        return True
    words = r"\bgloo\b|connection (closed|reset|refused)"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


def in_words(error: Exception) -> str:
    """An error in one line."""
    error = unwrap_health_check(error)
    lines = [line.strip() for line in without_passwords(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def as_told(failed: Exception) -> Exception:
    """What a person is told of a run that Ray Train gave up.

    Args:
        failed: raised by ``fit``.

    Returns:
        :class:`UserError` where a person has to mend something, else :class:`WorkerError`, or what it was.
    """
    if isinstance(failed, WorkerGroupError):
        rank, error = first_error(failed.worker_failures)
        return WorkerError(f"worker {rank} failed, {in_words(error)}")
    cause = failed.controller_failure if isinstance(failed, ControllerError) else failed
    if isinstance(cause, UserError):
        return UserError(str(cause))
    if is_cluster_too_small(cause):
        return UserError(" ".join(str(cause).split()))
    return failed
