"""Why a request gets no answer."""

from __future__ import annotations

from revmux.errors import UserError


class TextError(UserError):
    """A text that cannot be classified; found before it is queued, so its neighbours never meet it."""


class EmptyText(TextError):
    """Nothing to classify."""


class Overloaded(RuntimeError):
    """The queue is full: ask again later."""


class Draining(RuntimeError):
    """The engine is shutting down and takes no more requests."""


class InferenceFailed(RuntimeError):
    """The model failed on the batch that a request rode in."""
