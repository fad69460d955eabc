"""The settings of the data source and its splits. This module imports no large library."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.errors import UserError

EMBEDDED_TASK = "docstrings"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
"""Suffixes of the files that :mod:`revmux.data.sources.files` reads."""


@dataclass(frozen=True)
class DataConfig:
    """The labelled text and its splits.

    Args:
        source: ``docstrings`` (the embedded task: which installed library does a sentence document?), a CSV, TSV,
            JSON lines, Parquet or Arrow file, a folder with such files named train and dev or test (GLUE layout),
            or a data set on the hub.
        subset: configuration of a hub data set, such as ``sst2`` of ``nyu-mll/glue``.
        text_column: column of the text. By default, a column with a common name.
        pair_column: column of the second text of a pair. By default, a pair of columns with common names.
        label_column: column of the label. By default, a column with a common name.
        selection_share: fraction of train, at most 2,000 examples, that is held out as the selection set to choose
            checkpoints and settings.
        test_share: fraction that is held out as the test set, if the source has no such split.
        limit: maximum number of training examples, for a quick test.
        per_class: number of sentences per class of the embedded task.
        seed: determines every split.
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
            raise UserError(f"limit is {self.limit}; choose 1 or more examples, or omit it")
        if self.per_class < 20:
            raise UserError(f"per_class is {self.per_class}; choose 20 or more sentences per class")
