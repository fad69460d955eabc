"""Which labelled text, and how it is split. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.errors import UserError

EMBEDDED_TASK = "docstrings"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
"""Of the files that :mod:`revmux.data.sources.files` reads."""


@dataclass(frozen=True)
class DataConfig:
    """The labelled text.

    Args:
        source: ``docstrings`` (embedded: which installed library does a sentence document?), a CSV, TSV, JSON
            lines, Parquet or Arrow file, a folder with such files named train and dev or test (GLUE layout),
            or a data set on the hub.
        subset: configuration of a hub data set, such as ``sst2`` of ``nyu-mll/glue``.
        text_column: column of the text; found by its usual names where not given.
        pair_column: column of the second text of a pair; found by the usual names of both columns of a pair.
        label_column: column of the label; found likewise.
        selection_share: share of train, of 2,000 examples at most, that is held out to choose checkpoints and
            settings.
        test_share: share that is held out to be reported, where the source brings no split of its own.
        limit: at most so many training examples, for a quick look.
        per_class: sentences a class of the embedded task.
        seed: fixes every split.
    """

    source: str = EMBEDDED_TASK
    subset: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    selection_share: float = 0.1
    test_share: float = 0.2
    limit: int | None = None
    per_class: int = 1500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("selection_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose a share between 0 and 1, such as 0.1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; choose 1 or more examples, or leave it out")
        if self.per_class < 20:
            raise UserError(f"per_class is {self.per_class}; choose 20 or more sentences a class")
