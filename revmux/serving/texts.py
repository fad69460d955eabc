"""Texts to tokens, in many threads at once, each text by itself."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from revmux.serving.errors import EmptyText, TextError

Text = str | tuple[str, str]
"""A text, or a sentence pair."""


@dataclass(frozen=True)
class Encoded:
    """One text as tokens.

    Attributes:
        tokens: ``input_ids`` and the like, each a list of S numbers.
        truncated: whether the text was cut.
    """

    tokens: dict[str, list[int]]
    truncated: bool


class Encoder:
    """A tokenizer that threads may share.

    A fast tokenizer keeps its truncation setting in itself and fails when another thread changes it meanwhile, so
    every thread gets a copy.

    Args:
        tokenizer: the backbone's.
        max_length: tokens that an input may have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        self._original = tokenizer
        self._lock = threading.Lock()
        self._own = threading.local()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if not hasattr(self._own, "tokenizer"):
            with self._lock:
                self._own.tokenizer = copy.deepcopy(self._original)
        return self._own.tokenizer

    def encode(self, text: Text, truncate: bool = False) -> Encoded:
        """One text, or one pair, to tokens.

        Args:
            text: a string, or two.
            truncate: cut a long text as in training; otherwise it is refused.

        Raises:
            TextError: not a text, or longer than ``max_length`` tokens.
        """
        parts = tuple(text) if isinstance(text, (tuple, list)) else (text,)
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) for part in parts):
            raise TextError(f"an input is {text!r:.80}; give a string, or two strings for a sentence pair")
        if not all(parts):
            raise EmptyText("an input is an empty text; give at least one character")
        try:
            for part in parts:
                part.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"an input is not valid Unicode ({error.reason}); send UTF-8") from None
        tokenizer = self._tokenizer()
        encoded = tokenizer(*parts, truncation=False, verbose=False)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            if not truncate:
                raise TextError(
                    f"an input has {length} tokens, at most {self.max_length} are allowed; "
                    "shorten it, or set truncate to true"
                )
            encoded = tokenizer(*parts, truncation=True, max_length=self.max_length, verbose=False)
        return Encoded(dict(encoded), truncated=length > self.max_length)
