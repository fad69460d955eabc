"""Errors that the user caused and can fix."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid input from the user: a path, a column, a layer number, an artifact.

    The message is one line with the given value, the valid values and the remedy.
    A job prints it without a traceback and exits with status 2. A server answers with a 4xx status.
    """


def one_of(kind: str, given: object, valid: object, remedy: str) -> UserError:
    """An error with the common message ``unknown KIND GIVEN; known: VALID; REMEDY``."""
    known = ", ".join(str(item) for item in valid) if not isinstance(valid, str) else valid  # type: ignore[attr-defined]
    return UserError(f"unknown {kind} {given!r}; known: {known}; {remedy}")


class TextError(UserError):
    """A text that cannot be classified. The server rejects it before it is queued, so other inputs are not affected."""


class EmptyText(TextError):
    """The text is empty."""
