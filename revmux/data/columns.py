"""Detection of the columns for the text, its pair and the label. This module imports no large library."""

from __future__ import annotations

from collections.abc import Sequence

from revmux.data.config import DataConfig
from revmux.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "sentence1", "#1 String", "question", "question1", "premise", "review", "content")
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
)
LABEL_COLUMNS = ("label", "Quality", "labels", "category", "class", "target", "intent")


def find_columns(present: Sequence[str], config: DataConfig) -> dict[str, str]:
    """The column name for each of the roles ``text``, ``text_pair`` (pairs only) and ``label``.

    Args:
        present: column names of a table.
        config: the columns that the user named. The others are found by their common names.

    Raises:
        UserError: a column that the user named is missing, no column has a common name of a role, or one column has
            two roles.
    """
    _check_present(present, "label_column", config.label_column, config.source)

    text, pair = find_text_columns(present, config.text_column, config.pair_column, config.source, "--data.")
    label = config.label_column or _by_common_name(present, LABEL_COLUMNS, pair, config.source, "--data.label_column")
    columns = {"text": text, "text_pair": pair, "label": label}
    chosen = {role: name for role, name in columns.items() if name is not None}
    if len(set(chosen.values())) < len(chosen):
        raise UserError(
            f"columns {', '.join(chosen.values())} of {config.source} are not distinct; name a different column for each role"
        )
    return chosen


def find_text_columns(
    present: Sequence[str], text: str | None, pair: str | None, source: str, flags: str = "--"
) -> tuple[str, str | None]:
    """The column of the text, and that of its pair, or None if each input is a single text.

    Args:
        present: column names of a table.
        text: the column that the user named, if any.
        pair: the column of the second text that the user named, if any.
        source: name of the table, for error messages.
        flags: prefix of the settings on a command line, for error messages.

    Raises:
        UserError: a column that the user named is missing, or no column has a common name.
    """
    _check_present(present, "text_column", text, source)
    _check_present(present, "pair_column", pair, source)
    for first, second in PAIRS:
        if {first, second} <= set(present) and text in (None, first) and pair in (None, second):
            return first, second
    return text or _by_common_name(present, TEXT_COLUMNS, pair, source, f"{flags}text_column"), pair


def _check_present(present: Sequence[str], setting: str, given: str | None, source: str) -> None:
    if given is not None and given not in present:
        raise UserError(f"unknown {setting} {given!r}; columns of {source}: {', '.join(present)}; name one of these")


def _by_common_name(present: Sequence[str], names: tuple[str, ...], other: str | None, source: str, flag: str) -> str:
    match = next((name for name in names if name in present and name != other), None)
    if match is None:
        raise UserError(
            f"{source} has no {flag.rpartition('.')[2].lstrip('-')} with a common name ({', '.join(names)}); its columns: "
            f"{', '.join(present)}; name one with {flag}"
        )
    return match
