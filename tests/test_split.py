"""Held-out texts are independent of the texts that are kept."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from revmux.data import split as split_module
from revmux.data.split import contained, hold_out, words_of
from revmux.errors import UserError


def rows_of(texts: list[str], **columns: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts, **columns})


def sentences_and_phrases(sentences: int, seed: int = 0) -> list[str]:
    """Sentences of 8 to 30 of 2,000 words, each with its 8 phrases, as in a treebank; some phrases have one or two words."""
    generator = np.random.default_rng(seed)
    texts = []
    for length in generator.integers(8, 31, sentences):
        words = [f"w{word}" for word in generator.zipf(1.3, length) % 2000]
        cuts = np.sort(generator.integers(0, length + 1, (8, 2)), axis=1)
        texts += [" ".join(words), *(" ".join(words[start:end]) for start, end in cuts if start < end)]
    return list(dict.fromkeys(texts))


def leaks(train: Dataset, held: Dataset) -> int:
    kept = "\n".join(f" {' '.join(words_of(text))} " for text in train["text"])
    return sum(f" {' '.join(words_of(text))} " in kept for text in held["text"])


@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_phrase_is_part_of_a_text_that_is_kept(seed: int) -> None:
    rows = rows_of(sentences_and_phrases(300))
    at_random = rows.train_test_split(test_size=200, seed=seed)
    assert leaks(at_random["train"], at_random["test"]) > 50, "a random split holds out parts of what it keeps"
    train, held = hold_out(rows, 200, seed)
    assert leaks(train, held) == 0
    assert 195 <= len(held) <= 200
    assert sorted([*train["text"], *held["text"]]) == sorted(rows["text"])
    assert any(" " not in text or len(text.split()) < 8 for text in held["text"]), "phrases follow their sentences"


def test_texts_that_differ_only_in_case_and_punctuation_stay_together() -> None:
    texts = [
        f"{text} number {row}" for row in range(40) for text in ("A plain text,", "a plain, TEXT", "A plain text!")
    ]
    train, held = hold_out(rows_of(texts), 30, 0)
    assert len(held) == 30
    numbers = [{text.split()[-1] for text in split["text"]} for split in (train, held)]
    assert not numbers[0] & numbers[1]


def test_the_same_seed_gives_the_same_split_and_both_sides_are_shuffled() -> None:
    rows = rows_of([f"text {row}" for row in range(100)])
    first, again, other = (hold_out(rows, 20, seed) for seed in (0, 0, 1))
    assert list(first[1]["text"]) == list(again[1]["text"])
    assert set(first[1]["text"]) != set(other[1]["text"])
    for split in first:
        assert list(split["text"]) != sorted(split["text"], key=lambda text: int(text.split()[1]))


@pytest.mark.parametrize(
    "texts", [["same"] * 10, [" ".join("abcdefghij"[:end]) for end in range(1, 11)]], ids=["equal", "nested"]
)
def test_rows_that_all_belong_together_are_split_at_random(texts: list[str]) -> None:
    train, held = hold_out(rows_of(texts), 3, 0)
    assert (len(train), len(held)) == (7, 3)


def test_pairs_belong_together_only_as_a_whole() -> None:
    texts = ["one premise"] * 6 + ["one", "two", "three"]
    pairs = ["claim a", "claim b", "claim c", "claim d", "claim e", "claim e", "x", "y", "z"]
    train, held = hold_out(rows_of(texts, text_pair=pairs), 2, 0)
    assert len(held) == 2
    for split in (train, held):
        assert list(split["text_pair"]).count("claim e") in (0, 2)


def test_parts_are_found_in_all_the_roots_that_contain_them() -> None:
    texts = [words_of(text) for text in ("a b c d e", "x a b c", "b c d", "a b c", "e", "c", "d x")]
    assert set(contained(texts)) == {(2, 0), (3, 0), (3, 1), (4, 0), (5, 0), (5, 1)}, "the last one is part of none"


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every number of rows is too large for memory; returns the folder of the files."""
    monkeypatch.setattr(split_module, "IN_MEMORY", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "revmux" / "data"


def test_no_text_held_out_of_many_is_part_of_a_text_that_is_kept(many_rows: Path) -> None:
    phrases = sentences_and_phrases(300)
    rows = rows_of([*phrases, *(f"s{row} t{row} u{row}" for row in range(500))])
    train, held = hold_out(rows, 100, 0)
    assert leaks(train, held) == 0
    assert 60 <= len(held) <= 100
    assert sorted([*train["text"], *held["text"]]) == sorted(rows["text"])
    position = {text: row for row, text in enumerate(rows["text"])}
    assert [position[text] for text in train["text"]] == sorted(position[text] for text in train["text"])
    files = {file: file.stat().st_mtime_ns for file in many_rows.iterdir()}
    again = hold_out(rows_of(list(rows["text"])), 100, 0)
    assert list(again[1]["text"]) == list(held["text"])
    assert {file: file.stat().st_mtime_ns for file in many_rows.iterdir()} == files, "the rows are written once"
    assert set(hold_out(rows, 100, 1)[1]["text"]) != set(held["text"])


def test_equal_texts_among_many_stay_together(many_rows: Path) -> None:
    rows = rows_of([f"Text, {row // 2}" if row % 2 else f"text {row // 2}" for row in range(400)])
    train, held = hold_out(rows, 40, 0)
    assert 0 < len(held) <= 40
    assert leaks(train, held) == 0


@pytest.mark.usefixtures("many_rows")
def test_many_rows_with_few_texts_are_split_by_text() -> None:
    rows = rows_of([f"text {row % 40}" for row in range(2000)])
    train, held = hold_out(rows, 100, 0)
    assert len(held) == 100
    assert leaks(train, held) == 0


@pytest.mark.usefixtures("many_rows")
def test_the_choosing_set_of_many_repeated_rows_is_not_small() -> None:
    rows = rows_of([f"text {row // 3}" for row in range(6000)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, held = hold_out(rows, 200, 0)
    assert 190 <= len(held) <= 200
    assert leaks(train, held) == 0


@pytest.mark.usefixtures("many_rows")
def test_many_rows_of_which_no_text_can_be_held_out_are_refused() -> None:
    with pytest.raises(UserError, match=r"no rows can be held out of 10.*provide a separate file"):
        hold_out(rows_of(["same"] * 10), 3, 0)


@pytest.mark.usefixtures("many_rows")
def test_a_small_choosing_set_of_many_rows_is_reported() -> None:
    words = [f"w{place}" for place in range(1000)]
    texts = [" ".join(np.random.default_rng(seed).permutation(words)) for seed in range(6)]  # contain all words
    others = [f"v{place}" for place in range(20)]
    with pytest.warns(UserWarning, match=r"only \d+ of 500 rows are held out"):
        train, held = hold_out(rows_of([*texts, *words, *others]), 500, 0)
    assert leaks(train, held) == 0


def test_a_large_set_of_phrases_is_split_within_seconds() -> None:
    rows = rows_of(sentences_and_phrases(8000))
    assert len(rows) > 40_000
    started = time.process_time()
    hold_out(rows, 2000, 0)
    assert time.process_time() - started < 20
