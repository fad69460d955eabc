"""Texts to tokens for threads to share, each text by itself."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from revmux.data.tokens import encode_texts
from revmux.errors import EmptyText, TextError, UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.text_bound import TextBound

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
    """The prompt and the tokenizer of a backbone, for threads to share.

    A fast tokenizer keeps its truncation setting in itself and fails when another thread changes it meanwhile, so
    every thread gets a copy.

    Args:
        pretrained: the backbone.
        max_length: tokens that an input may have, a prompt's own included.
        pairs: whether the task has pairs of texts; False refuses them, None takes what the backbone records.

    Attributes:
        example: some input that can be answered.

    Raises:
        UserError: the prompt alone is longer than ``max_length``.
    """

    def __init__(self, pretrained: Pretrained, max_length: int, pairs: bool | None = None) -> None:
        self.max_length = max_length
        self._pairs = pretrained.pairs if pairs is None else pairs
        self._prompt = pretrained.prompt
        self._original = pretrained.tokenizer
        self._bound = TextBound(pretrained.tokenizer, max_length)
        self._lock = threading.Lock()
        self._own = threading.local()
        self.example = self._encode(
            ("ok", "ok") if self._prompt is not None and self._prompt.needs_pair else ("ok",), True
        )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if not hasattr(self._own, "tokenizer"):
            with self._lock:
                self._own.tokenizer = copy.deepcopy(self._original)
        tokenizer: PreTrainedTokenizerBase = self._own.tokenizer
        return tokenizer

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
        if len(parts) == 2 and self._pairs is False:
            raise TextError(
                "an input is a pair of texts, but the model was trained on single texts; give each text as an input of its "
                'own, over HTTP as [["one text"], ["another"]]'
            )
        try:
            for part in parts:
                part.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"an input is not valid Unicode ({error.reason}); send UTF-8") from None
        try:
            return self._encode(parts, truncate)
        except TextError:
            raise
        except UserError as error:
            raise TextError(str(error)) from None  # a pair where the prompt is for one text, or the reverse

    def _encode(self, parts: tuple[str, ...], truncate: bool) -> Encoded:
        tokenizer = self._tokenizer()
        bounded = [self._bound.shorten(part) for part in parts]
        parts = tuple(part for part, _ in bounded)
        if not any(is_cut for _, is_cut in bounded):
            tokens = self._tokens(tokenizer, parts)
            length = len(tokens["input_ids"])
            if length <= self.max_length:
                return Encoded(tokens, truncated=False)
            found = f"{length} tokens"
        else:
            found = f"more than {self._bound.characters} characters"
        if not truncate:
            raise TextError(
                f"an input has {found}, at most {self.max_length} tokens are allowed; shorten it, or set truncate to true"
            )
        first, *second = parts
        encoded, _ = encode_texts(tokenizer, [first], second or None, self.max_length, self._prompt)
        return Encoded({name: rows[0] for name, rows in encoded.items()}, truncated=True)

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, parts: tuple[str, ...]) -> dict[str, list[int]]:
        """All tokens of an input."""
        if self._prompt is None:
            return dict(tokenizer(*parts, truncation=False, verbose=False))
        written = [self._prompt.write(tokenizer, *parts)]
        return {name: rows[0] for name, rows in self._prompt.encode(tokenizer, written).items()}
