"""Human-rated sentiment: 23,703 sentences from films, products, editorials and tweets, each rated by 20 people.

The data set was published with VADER (Hutto and Gilbert, ICWSM 2014) under the MIT licence. The source distribution of the
package vaderSentiment contains it. The sentences make two tasks: ``sentiment`` (is the sentence negative or positive?)
and ``sentiment-source`` (which of the four kinds of text is it from?). Both have the same split. To prevent leakage from
train to test, the sentences of a review or article are in the same split, and so are near-duplicates.
"""

from __future__ import annotations

import html
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from revmux.data.config import MAX_SELECTION, SENTIMENT, SENTIMENT_SOURCE, DataConfig
from revmux.data.near_duplicates import near_duplicates
from revmux.data.sources.base import SOURCES, Source
from revmux.data.split import words_of
from revmux.errors import UserError
from revmux.utils.source_package import source_package

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    # class of the task sentiment-source: file of sentences
    "editorial": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
NEUTRAL = 0.3
"""Ratings from -4 to 4 up to this distance from 0 are neither negative nor positive."""
_PLACEHOLDERS = ("@anonymous", "http://url_removed")


@dataclass(frozen=True)
class RatedSentence:
    """A sentence with its mean rating from -4 to 4.

    Attributes:
        text: the sentence.
        rating: mean of the ratings of about 20 people.
        kind: kind of text, a key of :data:`FILES`.
        document: the review, article or tweet that it is from.
    """

    text: str
    rating: float
    kind: str
    document: str


@SOURCES.register(SENTIMENT, SENTIMENT_SOURCE)
class SentimentSource(Source):
    """Both tasks of the rated sentences."""

    def claims(self, source: str) -> bool:
        """Whether ``source`` is the name of one of the tasks."""
        return source in (SENTIMENT, SENTIMENT_SOURCE)

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits train, selection and test."""
        sentences = read_sentences(archive())
        by_kind = config.source == SENTIMENT_SOURCE
        return {
            split: Dataset.from_list([row for row in (_row(sentences[index], by_kind) for index in indices) if row])
            for split, indices in split_documents(sentences, config).items()
        }

    def identity(self) -> dict[str, Any]:
        """The package, which determines the text."""
        return {"package": f"{PACKAGE}=={VERSION}"}


def archive() -> Path:
    """The archive of the package, which the first use downloads.

    Raises:
        UserError: it cannot be downloaded.
    """
    return source_package(PACKAGE, VERSION, SHA256)


def read_sentences(package: Path) -> list[RatedSentence]:
    """The sentences in the archive of the source distribution. It is read without extracting any file.

    Raises:
        UserError: the archive does not have the expected files.
    """
    try:
        with tarfile.open(package) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
            return [sentence for kind, name in FILES.items() for sentence in _parse(inner, name, kind)]
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"cannot read the rated sentences in {package} ({error}); remove the file and start again"
        ) from None


def split_documents(sentences: Sequence[RatedSentence], config: DataConfig) -> dict[str, list[int]]:
    """The positions of the sentences of each split. Documents with near-duplicate sentences are in the same split."""
    groups = _groups(sentences)
    generator = np.random.default_rng(config.seed)
    order = [groups[index] for index in generator.permutation(len(groups))]
    test, rest = _draw(order, round(config.test_share * len(sentences)))
    left = sum(map(len, rest))
    selection, train = _draw(rest, min(MAX_SELECTION, round(config.selection_share * left)))
    found = {"train": train, "selection": selection, "test": test}
    return {
        name: generator.permutation([index for group in part for index in group]).tolist()
        for name, part in found.items()
    }


def _parse(inner: tarfile.TarFile, name: str, kind: str) -> Iterator[RatedSentence]:
    file = inner.extractfile(name)
    if file is None:
        raise KeyError(name)
    for line in file.read().decode("utf-8", errors="replace").split("\n"):
        if not line:
            continue
        identifier, rating, text = line.split("\t")
        yield RatedSentence(
            " ".join(html.unescape(text).split()), float(rating), kind, f"{kind} {identifier.split('_')[0]}"
        )


def _row(sentence: RatedSentence, by_kind: bool) -> dict[str, str] | None:
    if by_kind:
        return {"text": sentence.text, "label": sentence.kind}
    if abs(sentence.rating) <= NEUTRAL:
        return None
    return {"text": sentence.text, "label": "positive" if sentence.rating > 0 else "negative"}


def _groups(sentences: Sequence[RatedSentence]) -> list[list[int]]:
    """The positions of sentences that have to stay together."""
    parents = list(range(len(sentences)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(one: int, other: int) -> None:
        parents[max(root(one), root(other))] = min(root(one), root(other))

    firsts: dict[str, int] = {}
    for index, sentence in enumerate(sentences):
        join(index, firsts.setdefault(sentence.document, index))
    for one, other in near_duplicates([_compared(sentence.text) for sentence in sentences]):
        join(one, other)
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(sentences)):
        groups[root(index)].append(index)
    return list(groups.values())


def _compared(text: str) -> tuple[str, ...]:
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return words_of(text)


def _draw(groups: Sequence[list[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """The first groups that fit into ``size``, and the others."""
    drawn: list[list[int]] = []
    others: list[list[int]] = []
    count = 0
    for group in groups:
        fits = count + len(group) <= size
        (drawn if fits else others).append(group)
        count += len(group) if fits else 0
    return drawn, others
