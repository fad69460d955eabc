"""Errors that a person caused and can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from outside: a path, a column, a layer number, an artifact.

    The message names the value given, the legal values and the remedy on one line.
    A job prints it without a traceback and exits with status 2; a server answers 4xx.
    """


def one_of(kind: str, given: object, legal: object, remedy: str) -> UserError:
    """The common shape of a message: «unknown KIND GIVEN; known: LEGAL; REMEDY»."""
    known = ", ".join(str(item) for item in legal) if not isinstance(legal, str) else legal  # type: ignore[attr-defined]
    return UserError(f"unknown {kind} {given!r}; known: {known}; {remedy}")


class TextError(UserError):
    """A text that cannot be classified; found before it is queued, so its neighbours never meet it."""


class EmptyText(TextError):
    """Nothing to classify."""
