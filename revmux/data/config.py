"""The settings of the data source and its splits. This module imports no large library."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.errors import UserError

SENTIMENT, SENTIMENT_SOURCE, DOCSTRINGS = "sentiment", "sentiment-source", "docstrings"
EMBEDDED_TASK = "embedded"
"""The default: sentiment, or docstrings if the package of sentiment cannot be downloaded."""
BUILT_IN = (EMBEDDED_TASK, SENTIMENT, SENTIMENT_SOURCE, DOCSTRINGS)
"""Tasks that need neither the user's files nor a hub."""
MAX_SELECTION = 2000
"""Maximum number of examples in the selection set. More would only take time."""
MAX_TEST = 20_000
"""Maximum number of examples in a test split that is held out. The accuracy's standard error is then 0.35 points at most."""
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
"""Suffixes of the files that :mod:`revmux.data.sources.files` reads."""


@dataclass(frozen=True)
class DataConfig:
    """The labelled text and its splits.

    Args:
        source: Where the text comes from: sentiment (20,651 sentences that people rated as negative or positive; the first
            use downloads 2.5 MB with pip), sentiment-source (the same sentences: movie, product, editorial or tweet?),
            docstrings (which installed library does a sentence document?), a CSV, TSV, JSON lines, Parquet or Arrow file, a
            folder with such files named train and dev or test (GLUE layout), the URI of a file or folder such as
            s3://bucket/reviews.parquet, or the id of a data set on the Hugging Face hub.
            The default, embedded, is sentiment, or docstrings if the download fails.
        subset: Configuration of a hub data set, such as sst2 of nyu-mll/glue. Default: none.
        text_column: Column that contains the text. Default: found by its usual names, such as text or sentence.
        pair_column: Column that contains the second text, if each input is a pair. Default: found by the usual names of
            pairs, such as sentence1 and sentence2.
        label_column: Column that contains the label. Default: found by its usual names, such as label.
        selection_share: Share of train to hold out as the selection set, which is used to choose checkpoints and
            settings. Above 0 and below 1. At most 2,000 examples are held out. No held-out text is part of a training
            text.
        test_share: Share of the rows to hold out as the test split, if the source has none. Above 0 and below 1. At
            most 20,000 rows are held out.
        limit: Maximum number of training examples, for a quick run. At least 1. Default: all.
        per_class: Number of sentences per class of docstrings. At least 20.
        seed: Random seed of all splits.
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
