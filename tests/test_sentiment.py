"""The task of human-rated sentiment, read from a small archive of the same layout, and from the package if it is available."""

from __future__ import annotations

import io
import logging
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.near_duplicates import near_duplicates
from revmux.data.sources import sentiment
from revmux.data.sources.sentiment import FILES, INNER, read_sentences
from revmux.data.split import words_of
from revmux.data.task import TaskData, load_task
from revmux.utils import source_package as packages
from revmux.utils.source_package import source_package

SPLITS = ("train", "selection", "test")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def spelled(number: int) -> str:
    return " ".join(NUMBERS[int(digit)] for digit in f"{number:03}")


def lines_of(kind: str) -> list[str]:
    """60 documents; those of editorials and products have three sentences. A third of the sentences is neutral."""
    sentences = 3 if kind in ("editorial", "product") else 1
    return [
        f"{document}_{one}\t{(-1.5, 0.3, 2.5)[(document + one) % 3]}\t{kind} {spelled(document)}  &amp; {one} of it."
        for document in range(1, 61)
        for one in range(1, sentences + 1)
    ]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_package(file: Path, lines: Callable[[str], list[str]] = lines_of) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for kind, name in FILES.items():
            add(archive, name, "\n".join(lines(kind)).encode("latin-1"))
    with tarfile.open(file, "w:gz") as archive:
        add(archive, INNER, inner.getvalue())
    return file


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = write_package(tmp_path / "package.tar.gz")
    monkeypatch.setattr(sentiment, "source_package", lambda *_: file)
    return file


def texts(task: TaskData) -> dict[str, list[str]]:
    return {split: list(getattr(task, split)["text"]) for split in SPLITS}


def test_sentences_are_read_with_their_ratings_and_documents(package: Path) -> None:
    sentences = read_sentences(package)
    assert len(sentences) == 60 * 8
    found = {sentence.text: sentence for sentence in sentences}
    one = found["product zero one two & 2 of it."]
    assert (one.rating, one.kind, one.document) == (2.5, "product", "product 12")


def test_undecodable_bytes_are_replaced(tmp_path: Path) -> None:
    file = write_package(tmp_path / "p.tar.gz", lambda kind: [f"1_1\t1.0\tna\xefve {kind}"])
    assert read_sentences(file)[0].text == "na�ve editorial"


def test_the_task_leaves_out_neutral_sentences_and_splits_by_document(package: Path) -> None:
    task = load_task(DataConfig("sentiment", test_share=0.25))
    assert task.label_names == ["negative", "positive"]
    assert task.identity["source"] == "sentiment"
    assert task.identity["package"] == "vaderSentiment==3.3.2"
    found = texts(task)
    assert sum(map(len, found.values())) == 60 * 8 * 2 // 3
    assert len(found["test"]) == pytest.approx(0.25 * 320, abs=8)
    documents = [{text.partition("&")[0] for text in found[split]} for split in SPLITS]
    assert sum(map(len, documents)) == len(set.union(*documents)), "a document is in one split only"
    ratings = {sentence.text: sentence.rating for sentence in read_sentences(package)}
    assert all(label == (ratings[text] > 0) for text, label in zip(task.train["text"], task.train["label"]))


def test_the_kinds_of_text_are_a_second_task_with_the_same_split(package: Path) -> None:
    config = DataConfig("sentiment-source", seed=3)
    task, rated = load_task(config), load_task(DataConfig("sentiment", seed=3))
    assert task.label_names == ["editorial", "movie", "product", "tweet"]
    for split, found in texts(rated).items():
        assert set(found) < set(texts(task)[split])
    assert load_task(config).identity == task.identity
    assert texts(load_task(DataConfig("sentiment-source", seed=4)))["test"] != texts(task)["test"]


def test_near_duplicates_are_in_the_same_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(kind: str) -> list[str]:
        wordings = (
            "It is {} by far, I think",
            "@anonymous it is {}, by far I think!",
            "Well, it is {} by far, I think.",
        )
        return [
            f"{3 * number + place}\t2.0\t{wording.format(f'{kind} {spelled(number)}')}"
            for number in range(40)
            for place, wording in enumerate(wordings)
        ]

    file = write_package(tmp_path / "p.tar.gz", lines)
    monkeypatch.setattr(sentiment, "source_package", lambda *_: file)
    parts = sentiment.split_documents(read_sentences(file), DataConfig("sentiment"))
    numbers = [{index // 3 for index in parts[split]} for split in SPLITS]
    assert sum(map(len, numbers)) == 160, "each number is in one split only"


def test_near_duplicates_are_found_directly_or_through_others() -> None:
    given = [
        "I love it!",
        "i love it",
        "this is the best phone ever",
        "he said this is the best phone ever made, and left",
    ]
    given += ["nice", "a nice day", "one two three four five six seven", "one two three four five six nine"]
    pairs = {tuple(sorted(pair)) for pair in near_duplicates([words_of(text) for text in given])}
    assert pairs == {(0, 1), (2, 3), (6, 7)}, "a short text inside another one is no near-duplicate"


def test_a_package_without_the_files_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        add(archive, "README", b"")
    with pytest.raises(UserError, match=r"cannot read the rated sentences in .*other\.tar\.gz"):
        read_sentences(tmp_path / "other.tar.gz")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an index that is a folder with one page per package, without packages so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_without_the_package_the_default_is_docstrings_and_one_line_reports_it(
    registry: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"train": ["a b", "c d"], "selection": ["e f", "g h"], "test": ["i j", "k l"]}
    splits = {
        name: sentiment.Dataset.from_dict({"text": rows, "label": ["torch", "ray"]}) for name, rows in small.items()
    }
    monkeypatch.setattr("revmux.data.sources.docstrings.build_docstring_task", lambda *_: splits)
    with caplog.at_level(logging.WARNING):
        task = load_task(DataConfig())
    assert task.identity["source"] == "docstrings"
    assert texts(task)["train"] == small["train"]
    (line,) = caplog.messages
    assert line.startswith("The task is 'docstrings', because 'sentiment' is not available: cannot download")
    assert "\n" not in line


def test_without_the_package_its_named_tasks_are_refused_with_the_remedy(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"vaderSentiment 3.3.2 \(ERROR: No matching .* copy the archive to .*cache/revmux"
    ):
        load_task(DataConfig("sentiment"))


def test_the_default_is_sentiment(package: Path) -> None:
    default, named = load_task(DataConfig()), load_task(DataConfig("sentiment"))
    assert default.identity == named.identity


def test_several_processes_download_a_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content, calls = b"an archive", []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert "--require-hashes" in command
        (Path(command[command.index("--dest") + 1]) / "pack-1.tar.gz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    digest = packages.hashlib.sha256(content).hexdigest()
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: source_package("pack", "1", digest), range(4)))
    assert len(calls) == 1
    assert {file.read_bytes() for file in files} == {content}
    files[0].write_bytes(b"damaged")
    assert source_package("pack", "1", digest).read_bytes() == content, "a damaged file is downloaded again"
    with pytest.raises(UserError, match="cannot download the package pack 1"):
        source_package("pack", "1", digest[::-1])


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot download the package pack 1 \(\[Errno"):
        source_package("pack", "1", "0" * 64)


def test_the_real_package_has_the_expected_sentences() -> None:
    try:
        task = load_task(DataConfig("sentiment"))
    except UserError as error:
        pytest.skip(f"the package is not available: {error}")
    sizes = {split: len(found) for split, found in texts(task).items()}
    assert sum(sizes.values()) == 20_651
    assert sizes["test"] == pytest.approx(0.2 * 20_651, abs=200)
    assert 0.45 < sum(task.test["label"]) / sizes["test"] < 0.6
    kept = {words_of(text) for text in texts(task)["train"]}
    wordy = [text for text in texts(task)["test"] if len(words_of(text.replace("@anonymous", ""))) > 1]
    assert len(wordy) > 0.95 * sizes["test"]
    assert not any(words_of(text) in kept for text in wordy)
