"""Tokenising texts: a text of any size costs no more than one just over the limit and gives the same tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from revmux.data.prompt import Prompt
from revmux.data.tokens import encode_texts
from revmux.errors import TextError
from revmux.pretrained.encoder import Encoder
from revmux.pretrained.text_bound import TextBound

MAX_LENGTH = 16
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again; it never tires.",
    "Überraschung: naïve façades, 東京 and Москва, 1234567890 and (brackets)!",
    "a  lot   of    space\n\nand\tlines\r\nin between, as  code has it",
    *(f"word{index} other{index * 7} text{index % 13}" for index in range(200)),
]


def wordpiece() -> Tokenizer:
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in CORPUS for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))}
    characters = {character for word in words for character in word}
    # A vocabulary trained by the library differs between runs, since it breaks ties at random.
    pieces = sorted(words | characters | {f"##{character}" for character in characters})
    core = Tokenizer(models.WordPiece(dict(zip([*SPECIAL, *pieces], itertools.count())), unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    return core


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return core


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]"))
    return core


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"WordPiece": wordpiece, "BPE": byte_level, "Unigram": unigram}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    core = TOKENIZERS[request.param]()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def encoder(tokenizer: PreTrainedTokenizerFast, prompt: Prompt | None = None) -> Encoder:
    pretrained: Any = SimpleNamespace(tokenizer=tokenizer, prompt=prompt, pairs=None)
    return Encoder(pretrained, MAX_LENGTH if prompt is None else 2 * MAX_LENGTH)


def long_texts() -> dict[str, str]:
    rng = random.Random(0)
    words = " ".join(CORPUS).split()
    some = " ".join(rng.choice(words) for _ in range(30_000))
    return {
        "words": some,
        "spaces between words": "  \n \t ".join(some.split()[:20_000]),
        "one run of spaces": "the quick" + " " * 300_000 + some,
        "spaces first": "\n" * 300_000 + some,
        "one word": "x" * 300_000,
        "words too long for a vocabulary": " ".join("abc9" * 60 for _ in range(3_000)),
        "characters of many scripts": "".join(
            chr(rng.choice((0x61, 0xE9, 0x4E2D, 0x416, 0x1F600))) for _ in range(99_999)
        ),
        "punctuation": ".,;!" * 60_000,
    }


@pytest.mark.parametrize("name", long_texts())
def test_a_text_is_truncated_to_the_same_tokens_as_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    text = long_texts()[name]
    own = encoder(tokenizer)
    for parts in ((text,), ("the lazy dog", text), (text, "again and again")):
        expected, cut = encode_texts(tokenizer, [parts[0]], list(parts[1:]) or None, MAX_LENGTH)
        found = own.encode(parts, truncate=True)
        assert found.tokens["input_ids"] == expected["input_ids"][0]
        assert found.truncated == bool(cut)


@pytest.mark.parametrize("name", long_texts())
def test_a_prompted_text_is_truncated_to_the_same_tokens_as_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    text = long_texts()[name]
    prompt = Prompt("toy", "text: {text}\nis it?", {"a": ("a",)}, pair_template="one: {text} two: {text_pair} and")
    own = encoder(tokenizer, prompt)
    for parts in ((text,), ("the lazy dog", text)):
        expected, cut = encode_texts(tokenizer, [parts[0]], list(parts[1:]) or None, 2 * MAX_LENGTH, prompt)
        found = own.encode(parts, truncate=True)
        assert found.tokens["input_ids"] == expected["input_ids"][0]
        assert found.truncated == bool(cut)


@pytest.mark.parametrize("name", long_texts())
def test_a_text_that_fits_is_never_refused(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    text = long_texts()[name]
    whole = tokenizer(text, verbose=False)["input_ids"]
    if len(whole) <= MAX_LENGTH:
        assert encoder(tokenizer).encode(text).tokens["input_ids"] == whole
    else:
        with pytest.raises(TextError, match=r"at most 16 tokens are allowed; shorten it, or set truncate to true"):
            encoder(tokenizer).encode(text)


def test_spaces_that_give_no_tokens_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the quick" + " " * 2_000_000 + "fox"
    whole = tokenizer(text, verbose=False)["input_ids"]
    if len(whole) > MAX_LENGTH:
        pytest.skip("this tokenizer gives tokens for spaces")
    assert encoder(tokenizer).encode(text).tokens["input_ids"] == whole


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("prompted", [False, True])
def test_the_tokenizer_gets_a_bounded_part_of_a_two_megabyte_text(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, truncate: bool, prompted: bool
) -> None:
    own = encoder(tokenizer, Prompt("toy", "text: {text}", {"a": ("a",)}) if prompted else None)
    seen: list[int] = []
    original = PreTrainedTokenizerFast._encode_plus

    def watch(self: Any, text: Any, text_pair: Any = None, *arguments: Any, **more: Any) -> Any:
        seen.extend(len(part) for part in (text if isinstance(text, list) else [text]))
        return original(self, text, text_pair, *arguments, **more)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", watch)
    if truncate:
        assert own.encode("w " * 1_000_000, truncate).truncated
    else:
        with pytest.raises(TextError, match="more than"):
            own.encode("w " * 1_000_000, truncate)
    bound = TextBound(tokenizer, own.max_length).characters
    assert bound < 10_000
    assert max(seen, default=0) <= bound + len("text: ")
    assert bool(seen) or not truncate


def test_a_tokenizer_that_truncates_on_the_left_keeps_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    text = long_texts()["words"]
    tokenizer.truncation_side = "left"
    try:
        expected = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        assert encoder(tokenizer).encode(text, truncate=True).tokens["input_ids"] == expected
    finally:
        tokenizer.truncation_side = "right"
