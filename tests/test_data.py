"""Labelled text in every format: the same rows give the same task, and errors name the mistake."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from revmux import UserError
from revmux.data import task as task_module
from revmux.data.config import DataConfig
from revmux.data.sources import SOURCES, source_of
from revmux.data.sources import files as files_module
from revmux.data.task import TaskData, load_task
from revmux.data.tokens import TokenizedSplit
from revmux.pretrained.pretrained import Pretrained

SPLITS = ("train", "selection", "test")


def texts(task: TaskData, split: str = "train") -> list[str]:
    return list(getattr(task, split)["text"])


def load(source: Path, label_names: list[str] | None = None, **settings: Any) -> TaskData:
    return load_task(DataConfig(source=str(source), **settings), label_names)


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(rows: int, line: str = "text {row},{label}", header: str = "text,label") -> str:
    return "\n".join([header, *(line.format(row=row, label=row % 2) for row in range(rows))]) + "\n"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
def test_every_format_gives_the_same_task(suffix: str, tiny_files: dict[str, Path], tiny_rows: list) -> None:
    task = load(tiny_files[suffix])
    assert task.label_names == ["bad", "good"]
    assert not task.is_pair
    given = {row["text"]: row["label"] for row in tiny_rows}
    for split in SPLITS:
        rows = getattr(task, split)
        assert [task.label_names[label] for label in rows["label"]] == [given[text] for text in rows["text"]]
    assert task.identity["source"] == f"tiny.{suffix}"
    assert task.identity["sha256"] == load(tiny_files["csv"]).identity["sha256"], (
        "the identity depends on the content, not on the file"
    )


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_data_larger_than_memory_gives_the_same_task_from_mapped_files(
    suffix: str, tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task").mkdir()
    for split in ("train", "test"):
        (tmp_path / "task" / f"{split}.{suffix}").write_bytes(tiny_files[suffix].read_bytes())
    expected = load(tmp_path / "task")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(files_module, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(task_module, "IN_MEMORY", 0)
    task = load(tmp_path / "task")
    assert task.identity == expected.identity
    assert all(getattr(task, split)[:] == getattr(expected, split)[:] for split in SPLITS)
    assert all(getattr(task, split).cache_files for split in SPLITS), "memory-mapped"
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "revmux" / "data").iterdir()}
    assert load(tmp_path / "task").identity == expected.identity
    assert {file: file.stat().st_mtime_ns for file in written} == written, "files are written once"
    sent = pickle.dumps([task.without_train(), task.with_test_only()])
    shutil.rmtree(tmp_path / "cache")  # another machine has no such files
    choosing, tested = pickle.loads(sent)  # noqa: S301  # as Ray does
    assert choosing.selection[:] == expected.selection[:]
    assert choosing.test[:] == tested.test[:] == expected.test[:]


def test_at_most_twenty_thousand_rows_become_a_test_split(tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_module, "MAX_TEST", 5)
    assert len(load(tiny_csv).test) == 5


def test_splits_are_disjoint_sized_and_seeded(tiny_csv: Path, tiny_rows: list) -> None:
    task = load(tiny_csv, test_share=0.25, selection_share=0.2)
    assert [len(getattr(task, split)) for split in SPLITS] == [48, 12, 20]
    everything = [text for split in SPLITS for text in texts(task, split)]
    assert sorted(everything) == sorted(row["text"] for row in tiny_rows)
    again, other = load(tiny_csv, test_share=0.25, selection_share=0.2), load(tiny_csv, test_share=0.25, seed=1)
    assert again.identity == task.identity
    assert all(texts(again, split) == texts(task, split) for split in SPLITS)
    assert set(texts(other, "test")) != set(texts(task, "test"))


def test_a_limit_reduces_train_and_keeps_the_other_splits_and_all_classes(tmp_path: Path) -> None:
    file = write(tmp_path, "many.csv", "text,label\n" + "".join(f"text {row},c{row % 10}\n" for row in range(200)))
    task, whole = load(file, limit=5), load(file)
    assert len(task.train) == 5
    assert set(texts(task)) < set(texts(whole))
    assert texts(task, "test") == texts(whole, "test")
    assert task.label_names == [f"c{label}" for label in range(10)], "classes missing from the few examples are kept"


def test_a_glue_tsv_reads_quotes_as_text_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"]
    lines += [f'{row % 2}\t{row}\t{row}\tHe said " {row} .\t" It \'s so {row} , "" he said .\r\n' for row in range(20)]
    (tmp_path / "MRPC").mkdir()
    for name in ("train", "dev"):
        write(tmp_path / "MRPC", f"{name}.tsv", b"\xef\xbb\xbf" + "".join(lines).encode())
    task = load(tmp_path / "MRPC")
    assert task.is_pair
    assert task.label_names == ["0", "1"]
    assert task.test[3] == {"text": 'He said " 3 .', "text_pair": '" It \'s so 3 , "" he said .', "label": 1}
    assert len(task.test) == 20
    assert len(task.train) + len(task.selection) == 20
    assert task.identity["source"] == "MRPC"


def test_a_csv_supports_quoting_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = "".join(f'"one, ""two"" {row}",{row % 2}\n' for row in range(10))
    task = load(write(tmp_path, "marked.csv", b"\xef\xbb\xbf" + f"text,label\n{rows}".encode()))
    assert set(texts(task)) <= {f'one, "two" {row}' for row in range(10)}


def test_words_that_pandas_reads_as_missing_values_stay_text(tmp_path: Path) -> None:
    task = load(write(tmp_path, "na.csv", table(20, "NA,{label}")))
    assert set(texts(task)) == {"NA"}


@pytest.mark.parametrize(
    ("header", "text", "pair"),
    [
        ("sentence,label", "sentence", None),
        ("index,sentence1,sentence2,label", "sentence1", "sentence2"),
        ("index,question,sentence,label", "question", "sentence"),
        ("question1,question2,label", "question1", "question2"),
        ("premise,hypothesis,label", "premise", "hypothesis"),
        ("hypothesis,premise,label", "premise", "hypothesis"),
        ("review,label", "review", None),
        ("id,question,label", "question", None),
    ],
)
def test_columns_are_found_by_their_usual_names(header: str, text: str, pair: str | None, tmp_path: Path) -> None:
    names = header.split(",")
    line = ",".join("{label}" if name == "label" else f"{name} {{row}}" for name in names)
    task = load(write(tmp_path, "named.csv", table(10, line, header)))
    assert texts(task)[0].startswith(f"{text} ")
    assert task.is_pair == (pair is not None)
    if pair is not None:
        assert task.train["text_pair"][0].startswith(f"{pair} ")


def test_columns_can_be_named_in_the_settings(tmp_path: Path) -> None:
    file = write(tmp_path, "own.csv", table(10, "a{row},b{row},{label}", "left,right,stars"))
    task = load(file, text_column="right", pair_column="left", label_column="stars")
    assert texts(task)[0][0] == "b"
    assert task.train["text_pair"][0][0] == "a"
    reversed_pair = load(
        write(tmp_path, "pair.csv", table(10, "a{row},b{row},{label}", "sentence1,sentence2,label")),
        text_column="sentence2",
    )
    assert texts(reversed_pair)[0][0] == "b"
    assert not reversed_pair.is_pair


def test_a_wrong_column_is_refused_with_the_list_of_columns(tmp_path: Path) -> None:
    file = write(tmp_path, "own.csv", table(10, "a{row},{label}", "words,stars"))
    with pytest.raises(UserError, match=r"unknown text_column 'body'; columns of .*: words, stars"):
        load(file, text_column="body")
    with pytest.raises(UserError, match=r"no text_column with a common name .* its columns: words, stars; .*--data"):
        load(file)
    with pytest.raises(UserError, match="no label_column with a common name"):
        load(file, text_column="words")
    with pytest.raises(UserError, match="a different column for each role"):
        load(file, text_column="words", label_column="words")


def test_an_unknown_label_is_refused_with_its_row_and_the_label_set(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    write(tmp_path / "task", "train.csv", table(20))
    write(tmp_path / "task", "dev.csv", "text,label\nfirst,1\nsecond,maybe\n")
    with pytest.raises(UserError, match="test row 1 has the label 'maybe', which is not in the label set: 0, 1"):
        load(tmp_path / "task")


def test_numeric_labels_are_indices_only_if_they_are_not_class_names(tmp_path: Path) -> None:
    task = load(write(tmp_path, "numbers.csv", table(20)), ["negative", "positive"])
    assert task.label_names == ["negative", "positive"]
    assert all(text.endswith(("1", "3", "5", "7", "9")) == bool(label) for text, label in zip(*columns(task)))
    stars = write(tmp_path, "stars.csv", "text,label\n" + "".join(f"t{row},{1 + row % 3}\n" for row in range(30)))
    task = load(stars)
    assert task.label_names == ["1", "2", "3"]
    assert all(int(text[1:]) % 3 == label for text, label in zip(*columns(task)))
    (tmp_path / "task").mkdir()
    stars.rename(tmp_path / "task" / "train.csv")
    write(tmp_path / "task", "dev.csv", "text,label\na,1\nb,0\n")
    with pytest.raises(UserError, match="test row 1 has the label '0'"):
        load(tmp_path / "task")


def columns(task: TaskData) -> tuple[list[str], list[int]]:
    return list(task.train["text"]), list(task.train["label"])


def test_numeric_class_names_of_a_data_set_are_kept(tmp_path: Path) -> None:
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2", "3"])})
    rows = {"text": [f"t{row}" for row in range(30)], "label": [row % 3 for row in range(30)]}
    Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "stars.parquet")
    task = load(tmp_path / "stars.parquet")
    assert task.label_names == ["1", "2", "3"]
    assert all(int(text[1:]) % 3 == label for text, label in zip(*columns(task)))
    reordered = load(tmp_path / "stars.parquet", ["3", "2", "1"])
    assert all(2 - int(text[1:]) % 3 == label for text, label in zip(*columns(reordered)))
    renamed = load(tmp_path / "stars.parquet", ["poor", "fair", "fine"])
    assert all(int(text[1:]) % 3 == label for text, label in zip(*columns(renamed)))


@pytest.mark.parametrize("label", [None, ""])
def test_a_row_without_a_label_is_refused(label: str | None, tmp_path: Path) -> None:
    rows = [{"text": f"t{row}", "label": str(row % 2)} for row in range(20)] + [{"text": "odd", "label": label}]
    file = write(tmp_path, "rows.jsonl", "\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match="has no label"):
        load(file)


def test_a_split_with_hidden_labels_is_refused(tmp_path: Path) -> None:
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t{row}" for row in range(10)], "label": [-1] * 10}
    Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "hidden.parquet")
    with pytest.raises(UserError, match=r"has no label \(-1\)"):
        load(tmp_path / "hidden.parquet")


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row \d+ has an empty text"):
        load(write(tmp_path, "empty.csv", table(20, text + ",{label}")))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("shifted.csv", table(6, "some, text,{label}"), "cannot read .*shifted.csv"),  # an unquoted comma
        ("ragged.csv", table(6) + "some, text,1\n", "cannot read .*ragged.csv"),
        ("nothing.csv", "", "cannot read .*nothing.csv"),
        ("latin.csv", b"text,label\ncaf\xe9,1\n", "cannot read .*latin.csv"),
        ("broken.jsonl", '{"text": "a"', "cannot read .*broken.jsonl"),
        ("header.csv", "text,label\n", "0 labelled rows cannot be split"),
        ("single.csv", table(1), "1 labelled rows cannot be split"),
        ("same.csv", "text,label\n" + "a,1\n" * 10, r"only the labels \['1'\]"),
        ("free.csv", table(300, "text {row},{row}"), "'label' has .* values in .* rows"),
        ("notes.txt", "text", "ends in '.txt'; known: .csv"),
    ],
)
def test_files_without_a_usable_task_are_refused(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load(write(tmp_path, name, content))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", table(20))
    write(tmp_path, "dev.csv", "text,label\n")
    with pytest.raises(UserError, match="the split test has no rows; add labelled rows"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["./nowhere", "missing.csv", "/no/folder", "no-such-name"])
def test_an_unknown_source_raises_a_user_error(source: str) -> None:
    with pytest.raises(UserError, match=r"cannot find file or folder|unknown data 'no-such-name'"):
        load_task(DataConfig(source=source))


@pytest.mark.parametrize(
    ("present", "reported"),
    [(("train", "dev"), "dev"), (("train", "dev", "test"), "dev"), (("train", "test"), "test")],
)
def test_a_folder_reports_on_its_own_test_or_validation_split(
    present: tuple[str, ...], reported: str, tmp_path: Path
) -> None:
    for name in present:
        write(tmp_path, f"{name}.csv", table(20, name + " {row},{label}"))
    task = load(tmp_path)
    assert {text.split()[0] for text in texts(task, "test")} == {reported}
    assert {text.split()[0] for text in texts(task) + texts(task, "selection")} == {"train"}
    assert not set(texts(task)) & set(texts(task, "selection"))


def test_a_folder_without_both_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", table(10))
    with pytest.raises(UserError, match=r"contains \['train'\]; add files named train and dev"):
        load(tmp_path)
    write(tmp_path, "dev.csv", table(10, header="body,label"))
    with pytest.raises(UserError, match="a split has no column 'text'"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"test_share": 0.0}, {"selection_share": 1.0}, {"limit": 0}, {"per_class": 3}], ids=str
)
def test_invalid_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        DataConfig(**settings)


def test_the_truncation_count_covers_only_truncated_texts(tiny_pretrained: Pretrained) -> None:
    given = ["w1", "w1 w2 w3", "w1 w2 w3 w4", "w1 w2 w3 w4 w5 w6"]  # and two special tokens each
    split = TokenizedSplit(Dataset.from_dict({"text": given, "label": [0] * 4}), tiny_pretrained.tokenizer, 5)
    assert split.lengths.tolist() == [3, 5, 5, 5]
    assert split.truncated == 2
    batch = split.batch([0, 3])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert split.batch([0])["input_ids"].shape == (1, 3), "padded to the longest of the requested rows"


def test_pairs_become_two_segments(tiny_pretrained: Pretrained) -> None:
    rows = Dataset.from_dict({"text": ["w1 w2"], "text_pair": ["w3"], "label": [1]})
    batch = TokenizedSplit(rows, tiny_pretrained.tokenizer, 16).batch([0])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 7, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_the_documented_source_works(monkeypatch: pytest.MonkeyPatch, tiny_rows: list[dict[str, str]]) -> None:
    """The example of docs/add-a-data-source.md, as a user would copy it."""
    page = (Path(__file__).parents[1] / "docs" / "add-a-data-source.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))
    names: dict[str, Any] = {"__name__": "my_package.memory_source"}
    exec(code, names)
    names["MemorySource"].tables["reviews"] = tiny_rows
    task = load_task(DataConfig(source="memory:reviews"))
    assert task.label_names == ["bad", "good"]
    assert sum(len(split) for split in (task.train, task.selection, task.test)) == len(tiny_rows)
    assert task.identity["source"] == "memory:reviews"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("embedded", "EmbeddedSource"),
        ("sentiment", "SentimentSource"),
        ("sentiment-source", "SentimentSource"),
        ("docstrings", "DocstringSource"),
        ("missing.csv", "FileSource"),
        ("./missing", "FileSource"),
        (str(Path(__file__).parent), "FolderSource"),
        ("nyu-mll/glue", "HubSource"),
    ],
)
def test_each_source_kind_accepts_only_its_own_names(source: str, kind: str) -> None:
    assert type(source_of(DataConfig(source=source))).__name__ == kind
