"""Thread-safe tokenization of texts that arrive one by one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from revmux.data.tokens import encode_texts
from revmux.errors import EmptyText, TextError, UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.text_bound import TextBound
from revmux.text import Text


class Encoded(NamedTuple):
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
        first, *second = ("ok", "ok") if self._prompt is not None and self._prompt.needs_pair else ("ok",)
        example, _ = encode_texts(self._tokenizer(), [first], second or None, max_length, self._prompt)
        self.example = Encoded({name: rows[0] for name, rows in example.items()}, False)

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
        found = self.encode_many([text], truncate)[0]
        if isinstance(found, TextError):
            raise found
        return found

    def encode_many(self, texts: Sequence[Text], truncate: bool = False) -> list[Encoded | TextError]:
        """Tokenize M texts or pairs, in one call of the tokenizer for all texts and one for all pairs.

        Args:
            texts: strings, or pairs of strings.
            truncate: as in :meth:`encode`.

        Returns:
            For each text its tokens, or the error that :meth:`encode` would raise.
        """
        found: dict[int, Encoded | TextError] = {}
        whole: dict[int, tuple[str, ...]] = {}
        for place, text in enumerate(texts):
            try:
                parts = self._parts(text)
                bounded = [self._bound.shorten(part) for part in parts]
                if any(is_cut for _, is_cut in bounded):
                    too_many = f"more than {self._bound.characters} characters"
                    found[place] = self._cut(tuple(part for part, _ in bounded), too_many, truncate)
                else:
                    whole[place] = tuple(part for part, _ in bounded)
            except TextError as error:
                found[place] = error
        for number in (1, 2):
            same = {place: parts for place, parts in whole.items() if len(parts) == number}
            for place, one in zip(same, self._tokens(list(same.values()), truncate)):
                found[place] = one
        return [found[place] for place in range(len(texts))]

    def _parts(self, text: Text) -> tuple[str, ...]:
        """Check an input and return its one or two texts."""
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
        return parts

    def _tokens(self, inputs: Sequence[tuple[str, ...]], truncate: bool) -> list[Encoded | TextError]:
        """Tokenize inputs that all have as many parts."""
        if not inputs:
            return []
        tokenizer = self._tokenizer()
        try:
            if self._prompt is None:
                columns = tokenizer(*map(list, zip(*inputs)), truncation=False, verbose=False)
            else:
                columns = self._prompt.encode(tokenizer, [self._prompt.write(tokenizer, *parts) for parts in inputs])
        except UserError as error:  # pairs although the prompt is for one text, or the reverse
            return [TextError(str(error)) for _ in inputs]
        names, rows = list(columns), list(zip(*columns.values()))
        found: list[Encoded | TextError] = []
        for parts, row in zip(inputs, rows):
            tokens = dict(zip(names, row))
            length = len(tokens["input_ids"])
            if length <= self.max_length:
                found.append(Encoded(tokens, False))
                continue
            try:
                found.append(self._cut(parts, f"{length} tokens", truncate))
            except TextError as error:
                found.append(error)
        return found

    def _cut(self, parts: tuple[str, ...], too_many: str, truncate: bool) -> Encoded:
        """Truncate an input that is too long.

        Raises:
            TextError: it must not be truncated, or does not fit the prompt.
        """
        if not truncate:
            raise TextError(
                f"an input has {too_many}, but at most {self.max_length} tokens are allowed; shorten it, or set truncate to true"
            )
        first, *second = parts
        try:
            encoded, _ = encode_texts(self._tokenizer(), [first], second or None, self.max_length, self._prompt)
        except UserError as error:
            raise TextError(str(error)) from None
        return Encoded({name: rows[0] for name, rows in encoded.items()}, True)
