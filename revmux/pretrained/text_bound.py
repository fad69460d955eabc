"""A limit on the characters of a text that are tokenized, so that memory and time do not grow with its length."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 128
"""Maximum number of characters per token, unless the vocabulary has longer tokens.

Longer tokens occur only for text that is not in the vocabulary, such as words of thousands of letters.
"""
_SPACES = re.compile(r"[ \t\n\r]{2,}")
_WORDS = re.compile(rf"([A-Za-z0-9]{{{CHARACTERS_PER_TOKEN}}})[A-Za-z0-9]+")
_SPACE_SAMPLES = [
    sample
    for run in (" " * 40, "\n" * 40, "\t" * 40, "\r" * 40, " \n\t\r" * 10)
    for sample in (f"a{run}b", f"{run}a", f"a{run}", f"a {run}.")
]
_WORD_SAMPLES = [
    sample for word in ("a" * 400, "ab1" * 200, "Q" + "9" * 500) for sample in (word, f"a {word} b", f"{word}.b")
]


class TextBound:
    """Truncates texts to the characters that can affect the first ``max_length`` tokens.

    Args:
        tokenizer: the backbone's tokenizer.
        max_length: maximum number of tokens per input.

    Attributes:
        characters: maximum number of characters. A longer text has more than ``max_length`` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        longest = max(map(len, tokenizer.get_vocab()))
        # Two additional tokens, since the cut may change the last tokens.
        self.characters = (max_length + 2) * max(longest, CHARACTERS_PER_TOKEN)
        self._keeps_end = tokenizer.truncation_side == "left"

        def ids(text: str) -> list[int]:
            found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return found

        # Some tokenizers treat a run of spaces as one space, and some treat a very long word as one unknown token.
        self._squeezed: list[tuple[re.Pattern[str], str]] = [
            (pattern, shorter)
            for pattern, shorter, samples in ((_SPACES, " ", _SPACE_SAMPLES), (_WORDS, r"\1", _WORD_SAMPLES))
            if all(ids(sample) == ids(pattern.sub(shorter, sample)) for sample in samples)
        ]

    def shorten(self, text: str) -> tuple[str, bool]:
        """A text of at most :attr:`characters` characters with equivalent tokens.

        Returns:
            The text, and whether it was truncated. In both cases, its first ``max_length`` tokens are those of the whole
            text (its last tokens, if the tokenizer truncates on the left).
        """
        if len(text) <= self.characters:
            return text, False
        for pattern, shorter in self._squeezed:
            text = pattern.sub(shorter, text)
        if len(text) <= self.characters:
            return text, False
        return (text[-self.characters :] if self._keeps_end else text[: self.characters]), True
