"""Near-duplicates among texts: the same words, one text inside another, or mostly the same sequences of words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from revmux.data.split import Words, contained

_LONG = 5  # words of a text that counts as a near-duplicate of any text that contains it
_SEQUENCE = 3  # words per sequence
_COMMON = 0.4  # share of all sequences of two texts that both have
_FREQUENT = 100  # a sequence in more texts is a figure of speech and is not compared


def near_duplicates(texts: Sequence[Words]) -> Iterator[tuple[int, int]]:
    """Pairs of positions that connect all near-duplicates, directly or through others.

    Two texts are near-duplicates if they have the same words, if the shorter one has at least 5 words and is part of the
    other, or if at least 40% of all their three-word sequences occur in both.

    Args:
        texts: the words of each text, see :func:`revmux.data.split.words_of`.
    """
    positions: dict[Words, list[int]] = defaultdict(list)
    for position, words in enumerate(texts):
        positions[words].append(position)
    for same in positions.values():
        yield from pairwise(same)
    distinct = list(positions)
    first = [positions[words][0] for words in distinct]
    for part, root in contained(distinct):
        if len(distinct[part]) >= _LONG:
            yield first[part], first[root]
    for one, other in _similar(distinct):
        yield first[one], first[other]


def _similar(texts: Sequence[Words]) -> Iterator[tuple[int, int]]:
    sequences = [{words[start : start + _SEQUENCE] for start in range(len(words) - _SEQUENCE + 1)} for words in texts]
    having: dict[Words, list[int]] = defaultdict(list)
    for index, found in enumerate(sequences):
        for sequence in found:
            having[sequence].append(index)
    common = Counter(
        pair for indices in having.values() if len(indices) <= _FREQUENT for pair in combinations(indices, 2)
    )
    for (one, other), shared in common.items():
        if shared >= _COMMON * (len(sequences[one]) + len(sequences[other]) - shared):
            yield one, other
