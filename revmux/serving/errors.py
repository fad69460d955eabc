"""Why a request gets no answer."""

from __future__ import annotations

from collections.abc import Iterable

from revmux.errors import UserError


class UnknownTask(UserError):
    """A task that is not served here.

    Args:
        name: the task that was asked for; None where a request named none of several.
        known: the tasks that are served.
    """

    def __init__(self, name: str | None, known: Iterable[str]) -> None:
        self.known = sorted(known)
        asked = "no task is named" if name is None else f"unknown task {name!r}"
        super().__init__(f"{asked}; known tasks: {', '.join(self.known) or 'none'}")


class Overloaded(RuntimeError):
    """The queue is full: ask again later."""


class Draining(RuntimeError):
    """The engine is shutting down and takes no more requests."""


class Expired(RuntimeError):
    """The deadline of a request passed while it waited; it was not computed."""


class InferenceFailed(RuntimeError):
    """The model failed on the batch that a request rode in."""
