"""Thread-safe tokenization of single texts."""

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
    """The tokens of one text.

    Attributes:
        tokens: ``input_ids`` and so on, each a list of S numbers.
        truncated: whether the text was truncated.
    """

    tokens: dict[str, list[int]]
    truncated: bool


class Encoder:
    """Applies a backbone's prompt and tokenizer. Several threads can share an encoder.

    A fast tokenizer stores its truncation setting and fails if another thread changes it during a call. Each thread
    therefore has its own copy.

    Args:
        pretrained: the backbone.
        max_length: maximum number of tokens per input, including those of the prompt.
        pairs: whether the task has pairs of texts. If False, a pair is an error. None means the backbone's setting.

    Attributes:
        example: a valid input, for example for warm-up.

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
        """Tokenize one text, or one pair of texts.

        Args:
            text: a string, or two strings.
            truncate: whether to truncate a long text, as in training. Otherwise it is an error.

        Raises:
            TextError: the input is not a text, is longer than ``max_length`` tokens, or is a pair although the model was
                trained on single texts.
        """
        parts = tuple(text) if isinstance(text, (tuple, list)) else (text,)
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) for part in parts):
            raise TextError(f"an input is {text!r:.80}; send a string, or two strings for a sentence pair")
        if not all(parts):
            raise EmptyText("an input is an empty text; send at least one character")
        if len(parts) == 2 and self._pairs is False:
            raise TextError(
                "an input is a pair of texts, but the model was trained on single texts; send each text as a separate "
                'input, over HTTP as [["one text"], ["another"]]'
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
            raise TextError(str(error)) from None  # a pair although the prompt is for one text, or the reverse

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
                f"an input has {found}, but at most {self.max_length} tokens are allowed; shorten it, or set truncate to true"
            )
        first, *second = parts
        encoded, _ = encode_texts(tokenizer, [first], second or None, self.max_length, self._prompt)
        return Encoded({name: rows[0] for name, rows in encoded.items()}, truncated=True)

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, parts: tuple[str, ...]) -> dict[str, list[int]]:
        """All tokens of an input, without truncation."""
        if self._prompt is None:
            return dict(tokenizer(*parts, truncation=False, verbose=False))
        written = [self._prompt.write(tokenizer, *parts)]
        return {name: rows[0] for name, rows in self._prompt.encode(tokenizer, written).items()}
