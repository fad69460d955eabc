"""How much of a long text a tokenizer must see, so that memory and time do not grow with what a client sends."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 128
"""Characters that one token covers at most, unless the vocabulary has longer ones.

Longer tokens exist only for what a tokenizer does not know, such as words of thousands of letters.
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
    """Cuts texts to what can matter for ``max_length`` tokens.

    Args:
        tokenizer: of the backbone.
        max_length: tokens that an input may have.

    Attributes:
        characters: that a text may have; any longer one has more than ``max_length`` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        longest = max(map(len, tokenizer.get_vocab()))
        # Two tokens to spare, since a cut may change the last ones.
        self.characters = (max_length + 2) * max(longest, CHARACTERS_PER_TOKEN)
        self._keeps_end = tokenizer.truncation_side == "left"

        def ids(text: str) -> list[int]:
            found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return found

        # Some tokenizers read a run of spaces as one, and some any very long word as one unknown token.
        self._squeezed: list[tuple[re.Pattern[str], str]] = [
            (pattern, shorter)
            for pattern, shorter, samples in ((_SPACES, " ", _SPACE_SAMPLES), (_WORDS, r"\1", _WORD_SAMPLES))
            if all(ids(sample) == ids(pattern.sub(shorter, sample)) for sample in samples)
        ]

    def shorten(self, text: str) -> tuple[str, bool]:
        """A text of at most :attr:`characters` characters that the tokenizer reads alike.

        Returns:
            The text, and whether it was cut. Its first ``max_length`` tokens, or its last ones where the tokenizer
            truncates on the left, are those of the whole text either way.
        """
        if len(text) <= self.characters:
            return text, False
        for pattern, shorter in self._squeezed:
            text = pattern.sub(shorter, text)
        if len(text) <= self.characters:
            return text, False
        return (text[-self.characters :] if self._keeps_end else text[: self.characters]), True
