"""The tokens that a prompt puts before every text, whatever the text is."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from revmux.data.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
_LAST_WORD = re.compile(r"(^|\s+)\S*\Z")
_STARTS = ("", *string.printable, "a b", "it's", "'s", "...", "!!", "\n\n", "  a", "é", "中", "😀", "\u0301")
"""Beginnings of texts whose tokens might join those of the template."""


def constant_tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first tokens of every input, up to the last space or line break before the text.

    Args:
        prompt: with a template for single texts, for pairs, or both.
        tokenizer: the model's tokenizer.

    Returns:
        The tokens; none for a tokenizer that does not say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        return []
    paired = prompt.needs_pair or prompt.pair_template is not None
    seconds = [None] * (not prompt.needs_pair) + ["a"] * paired
    written = [prompt.write(tokenizer, start, second) for start in _STARTS for second in seconds]
    before = _LAST_WORD.sub("", "".join(_common_start(written)))  # a tokenizer joins no word with the space after it
    encoded = prompt.encode(tokenizer, written)
    shortest = min(map(len, encoded["input_ids"]))
    common = _common_start(encoded["input_ids"])[: shortest - 1]  # every input has a token of its own
    ends = [end for _, end in encoded.encodings[0].offsets[: len(common)]]  # type: ignore[index]  # set by a fast tokenizer
    return common[: sum(1 for _ in takewhile(lambda end: end <= len(before), ends))]


def _common_start(rows: Sequence[Sequence[Item]]) -> list[Item]:
    """The items with which all rows begin."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]
