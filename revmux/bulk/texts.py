"""Find bad rows, and tokenize the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from revmux.backbone import TokenBatch
from revmux.bulk.formats import Rows
from revmux.data.padding import Padder
from revmux.data.tokens import TEXTS_AT_ONCE, encode_texts
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.text_bound import TextBound


@dataclass(frozen=True)
class Tokens:
    """The tokens of M inputs without padding.

    Attributes:
        columns: the tensors that the backbone reads, such as ``input_ids``: each (T,) int32, all inputs concatenated.
        starts: (M + 1,) position of each input's first token.
    """

    columns: dict[str, np.ndarray]
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens per input."""
        lengths: list[int] = np.diff(self.starts).tolist()
        return lengths

    def padded(self, rows: Sequence[int], padder: Padder) -> TokenBatch:
        """Some inputs, padded to the longest of them as the tokenizer pads: each tensor (R, S)."""
        starts, lengths = self.starts[rows], np.diff(self.starts)[rows]  # (R,)
        ends = np.cumsum(lengths)
        source = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])
        present = padder.present(lengths)  # (R, S)
        return {name: padder.spread(name, values[source], present) for name, values in self.columns.items()}

    def take(self, rows: Sequence[int]) -> Tokens:
        """The tokens of some inputs, in the order of ``rows``."""
        parts = [slice(self.starts[row], self.starts[row + 1]) for row in rows]
        columns = {name: np.concatenate([values[part] for part in parts]) for name, values in self.columns.items()}
        return Tokens(columns, np.cumsum([0, *(part.stop - part.start for part in parts)]))


def problem_of(value: Any) -> str | None:
    """Why a value cannot be classified, or None."""
    if value is None:
        return "the text is missing"
    if not isinstance(value, str):
        return f"the text is a {type(value).__name__}, not a string"
    if not value:
        return "the text is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "the text is not valid UTF-8"
    return None


def find_problems(rows: Rows) -> list[str | None]:
    """By row, why it cannot be classified, or None."""
    problems: list[str | None] = []
    for index, text in enumerate(rows.texts):
        problem = rows.problems.get(index) or problem_of(text)
        if problem is None and rows.pairs is not None:
            problem = problem_of(rows.pairs[index])
            problem = problem and problem.replace("the text", "the second text", 1)
        problems.append(problem)
    return problems


class Tokenizer:
    """Applies a backbone's prompt and tokenizer to many texts.

    Args:
        pretrained: the backbone. Its tokenizer must not be used by other threads meanwhile.
        max_length: maximum number of tokens per input, including those of the prompt.
    """

    def __init__(self, pretrained: Pretrained, max_length: int) -> None:
        self._pretrained = pretrained
        self._max_length = max_length
        self._bound = TextBound(pretrained.tokenizer, max_length)

    def encode(self, texts: list[str], pairs: list[str] | None) -> tuple[Tokens, int]:
        """Tokenize valid texts, and truncate the long ones.

        Returns:
            The tokens, and the number of truncated inputs.
        """
        columns: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        truncated = 0
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            # A text that is shortened here is still longer than max_length, so it counts as truncated below.
            part = [self._bound.shorten(text)[0] for text in texts[start : start + TEXTS_AT_ONCE]]
            second = pairs and [self._bound.shorten(text)[0] for text in pairs[start : start + TEXTS_AT_ONCE]]
            encoded, cut = encode_texts(
                self._pretrained.tokenizer, part, second, self._max_length, self._pretrained.prompt
            )
            truncated += cut
            lengths += map(len, encoded["input_ids"])
            for name, values in encoded.items():
                columns.setdefault(name, []).append(np.fromiter(chain.from_iterable(values), np.int32))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Tokens({name: np.concatenate(parts) for name, parts in columns.items()}, starts), truncated
