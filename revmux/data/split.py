"""Splits whose two sides share no text: a held-out text is never part of a text on the other side.

A random split of SST-2, whose rows are sentences and their phrases, holds out many phrases of sentences that the model
trains on. The held-out side then rewards a model for texts that it has seen.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset

from revmux.data.blocks import IN_MEMORY, blocks, stored
from revmux.data.content import content_digest
from revmux.errors import UserError

Words = tuple[str, ...]
_BETWEEN = "\0"  # between the two texts of a pair, so that no text reaches across
_OPENING = 3  # words by which texts are indexed
_SAMPLED = 4  # rows in a sample for each row to hold out


def hold_out(rows: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Divide rows at random, such that no held-out text is part of a text that is kept.

    A text that is not part of another one is a root. Roots are drawn at random. A text is held out if all roots that
    contain it are, so a phrase follows its sentence, and a phrase of several sentences is kept unless all of them are
    held out. Texts are compared by their words, without case and punctuation. The two texts of a pair count as one.

    Of more than :data:`revmux.data.blocks.IN_MEMORY` rows, a sample of texts is drawn first, each with all of its rows: texts
    that are part of a text outside of it are kept, and the others are divided as above. Memory then depends on ``size`` and,
    if few texts can be held out, on the number of distinct texts.

    Args:
        rows: columns ``text`` and, for pairs, ``text_pair``. At least two rows.
        size: number of rows to hold out, at least 1. A few rows fewer are held out if the texts allow no such division;
            if a sample was drawn, a warning reports less than half of them.
        seed: random seed.

    Returns:
        The kept rows and the held-out rows, each in random order; if a sample was drawn, the kept rows in their order.

    Raises:
        UserError: none of the sampled texts can be held out.
    """
    size = min(size, len(rows) - 1)
    if len(rows) > IN_MEMORY:
        return _hold_out_of_many(rows, size, seed)
    by_text: dict[Words, list[int]] = defaultdict(list)
    for row, words in enumerate(_words(blocks(rows))):
        by_text[words].append(row)
    generator = np.random.default_rng(seed)
    held = np.zeros(len(rows), dtype=bool)
    held[_draw(by_text, size, generator)] = True
    if not held.any():  # every row belongs to one root
        held[generator.permutation(len(rows))[:size]] = True
    order = generator.permutation(len(rows))
    return rows.select(order[~held[order]]), rows.select(order[held[order]])


def _hold_out_of_many(rows: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """:func:`hold_out` for more rows than are kept in memory. The result is kept for later processes."""
    key = hashlib.sha256(f"{content_digest(rows)} hold out texts {size} {seed}".encode()).hexdigest()[:32]
    held = stored(f"{key}-held", _drawn(rows, size, seed)).with_format("numpy")["row"][:]
    if 2 * len(held) < size:
        warnings.warn(
            f"only {len(held):,} of {size:,} rows are held out, because the other texts of a sample are part of texts "
            "outside of it or have too many equal rows; provide a separate file for this split to hold out more rows",
            stacklevel=3,
        )
    ordered = np.sort(held)
    kept = stored(f"{key}-kept", _filtered(rows, ordered, keep=False))
    found = pa.concat_tables(_filtered(rows, ordered, keep=True))
    return kept, Dataset(found.take(np.searchsorted(ordered, held)))


def _drawn(rows: Dataset, size: int, seed: int) -> Iterator[pa.Table]:
    """The numbers of the rows to hold out, in random order, as one block."""
    generator = np.random.default_rng(seed)
    share = min(_SAMPLED * size / len(rows), 0.5)
    while True:
        texts: dict[Words, list[int]] = defaultdict(list)
        for row, words in enumerate(_words(blocks(rows))):
            if _place(words, seed) < share and len(texts[words]) <= size:  # with more rows, it cannot be held out
                texts[words].append(row)
        inside = _found_in(texts, (words for words in _words(blocks(rows)) if words not in texts))
        held = _draw({words: found for words, found in texts.items() if words not in inside}, size, generator)
        if held or share == 0.5:
            break
        share = min(_SAMPLED * share, 0.5)  # few texts, each in many rows
    if not held:
        raise UserError(
            f"no rows can be held out of {len(rows):,}: every text has more than {size:,} equal rows, or is part of another "
            "one; provide a separate file for this split, such as dev.csv beside train.csv"
        )
    yield pa.table({"row": generator.permutation(held)})


def _place(words: Words, seed: int) -> float:
    """A number between 0 and 1 at which a text with these words lies in a random order of all texts."""
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8, salt=str(seed).encode()[:16]).digest()
    return int.from_bytes(digest, "big") / 2**64


def _filtered(rows: Dataset, chosen: np.ndarray, keep: bool) -> Iterator[pa.Table]:
    """Blocks of the chosen rows, or of all others. Blocks are read in turn: single rows would each map many pages.

    Args:
        rows: all rows.
        chosen: sorted row numbers.
        keep: whether the chosen rows are wanted.
    """
    start = 0
    for block in blocks(rows):
        first, last = np.searchsorted(chosen, [start, start + len(block)])
        mask = np.full(len(block), not keep)
        mask[chosen[first:last] - start] = keep
        yield block.filter(pa.array(mask))
        start += len(block)


def _words(found: Iterable[pa.Table]) -> Iterator[Words]:
    """The words of each row of some blocks."""
    for block in found:
        texts = block["text"].to_pylist()
        if "text_pair" not in block.column_names:
            yield from map(words_of, texts)
            continue
        for text, pair in zip(texts, block["text_pair"].to_pylist()):
            yield (*words_of(text), _BETWEEN, *words_of(pair))


def _found_in(texts: Iterable[Words], others: Iterable[Words]) -> set[Words]:
    """The texts that are part of one of the others, or equal to it."""
    known, lengths = set(texts), _lengths_by_opening(texts)
    widths = sorted(set(map(len, lengths)))  # most texts are not shorter than an opening
    found: set[Words] = set()
    for words in others:
        for start in range(len(words)):
            for width in widths:
                for length in lengths.get(words[start : start + width], ()):
                    if length > len(words) - start:
                        break
                    part = words[start : start + length]
                    if part in known:
                        found.add(part)
    return found


def words_of(text: object) -> Words:
    """The words of a text, without case and punctuation. A text without words is one word."""
    plain = str(text).casefold()
    return tuple(re.findall(r"\w+", plain)) or (plain.strip(),)


def contained(texts: Sequence[Words]) -> Iterator[tuple[int, int]]:
    """All pairs of a text that is part of another one and a root that contains it.

    Args:
        texts: distinct texts.

    Yields:
        The position of the text and the position of the root. A text that is never the first of a pair is a root.
    """
    position = {words: index for index, words in enumerate(texts)}
    lengths = _lengths_by_opening(texts)
    inside: set[int] = set()
    for root in sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True):
        if root in inside:
            continue  # what it contains is part of its own roots too
        words, found = texts[root], set()
        for start in range(len(words)):
            for width in range(1, min(_OPENING, len(words) - start) + 1):
                for length in lengths.get(words[start : start + width], ()):
                    if length > len(words) - start:
                        break
                    index = position.get(words[start : start + length])
                    if index is not None and index != root:
                        found.add(index)
        inside |= found
        for index in sorted(found):
            yield index, root


def _lengths_by_opening(texts: Iterable[Words]) -> dict[Words, list[int]]:
    """The lengths of the texts that begin with the same words, in increasing order."""
    lengths: dict[Words, list[int]] = defaultdict(list)
    for opening, length in sorted({(words[:_OPENING], len(words)) for words in texts}, key=lambda pair: pair[1]):
        lengths[opening].append(length)
    return lengths


def _draw(by_text: dict[Words, list[int]], size: int, generator: np.random.Generator) -> list[int]:
    """The rows that are held out; none if every group of rows that belong together is larger than ``size``."""
    texts = list(by_text)
    rows = list(by_text.values())
    parts: dict[int, list[int]] = defaultdict(list)
    kept_roots = [0] * len(texts)
    for part, root in contained(texts):
        parts[root].append(part)
        kept_roots[part] += 1
    held: list[int] = []
    for root in generator.permutation([index for index, roots in enumerate(kept_roots) if not roots]).tolist():
        follows = [part for part in parts[root] if kept_roots[part] == 1]
        group = [row for index in (root, *follows) for row in rows[index]]
        if len(held) + len(group) > size:
            continue
        held += group
        for part in parts[root]:
            kept_roots[part] -= 1
        if len(held) == size:
            break
    return held
