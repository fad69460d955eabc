"""Errors of requests that get no answer."""

from __future__ import annotations

from collections.abc import Iterable

from revmux.errors import UserError


class UnknownTask(UserError):
    """The request names a task that is not served, or no task although there are several.

    Args:
        name: the requested task; None if the request names none.
        known: the tasks that are served.
    """

    def __init__(self, name: str | None, known: Iterable[str]) -> None:
        self.known = sorted(known)
        problem = "no task is named" if name is None else f"unknown task {name!r}"
        super().__init__(f"{problem}; known tasks: {', '.join(self.known) or 'none'}")


class Overloaded(RuntimeError):
    """The queue is full. The client should retry later."""


class Draining(RuntimeError):
    """The engine is shutting down and accepts no more requests."""


class Expired(RuntimeError):
    """The deadline of an input passed while it waited in the queue. It was not computed."""


class InferenceFailed(RuntimeError):
    """The model failed on the batch that contained the input."""
