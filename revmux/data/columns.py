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
    for setting in ("text_column", "pair_column", "label_column"):
        given = getattr(config, setting)
        if given is not None and given not in present:
            raise UserError(
                f"unknown {setting} {given!r}; columns of {config.source}: {', '.join(present)}; name one of these"
            )

    def by_common_name(names: tuple[str, ...], setting: str) -> str:
        match = next((name for name in names if name in present and name != pair), None)
        if match is None:
            raise UserError(
                f"{config.source} has no {setting} with a common name ({', '.join(names)}); its columns: "
                f"{', '.join(present)}; name one with --data.{setting}"
            )
        return match

    text, pair = config.text_column, config.pair_column
    for first, second in PAIRS:
        if {first, second} <= set(present) and text in (None, first) and pair in (None, second):
            text, pair = first, second
            break
    columns = {
        "text": text or by_common_name(TEXT_COLUMNS, "text_column"),
        "text_pair": pair,
        "label": config.label_column or by_common_name(LABEL_COLUMNS, "label_column"),
    }
    chosen = {role: name for role, name in columns.items() if name is not None}
    if len(set(chosen.values())) < len(chosen):
        raise UserError(
            f"columns {', '.join(chosen.values())} of {config.source} are not distinct; name a different column for each role"
        )
    return chosen
