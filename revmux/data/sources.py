"""Text with labels from anywhere: the embedded task, a user's files, a GLUE-layout folder, the hub."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset

from revmux.data.docstrings import build_docstring_task, library_versions
from revmux.errors import UserError

EMBEDDED_TASK = "docstrings"
TEXT_COLUMNS = ("text", "sentence", "sentence1", "#1 String", "question", "question1", "premise", "review", "content")
PAIR_COLUMNS = ("text_pair", "sentence2", "#2 String", "question2", "hypothesis")
LABEL_COLUMNS = ("label", "Quality", "labels", "category", "class", "target", "intent")
MAX_SELECTION = 2000  # examples that choose between checkpoints; more would only cost time
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")


@dataclass(frozen=True)
class DataConfig:
    """The labelled text.

    Args:
        source: ``docstrings`` (embedded: which installed library does a sentence document?), a CSV, TSV, JSON
            lines, Parquet or Arrow file, a folder with such files named train and dev or test (GLUE layout),
            or a data set on the hub.
        subset: configuration of a hub data set, such as ``sst2`` of ``nyu-mll/glue``.
        text_column: column of the text; found by its usual names where not given.
        pair_column: column of the second text of a pair; found likewise.
        label_column: column of the label; found likewise.
        selection_share: share of train, of 2,000 examples at most, that is held out to choose checkpoints and
            settings.
        test_share: share that is held out to be reported, where the source brings no split of its own.
        limit: at most so many training examples, for a quick look.
        per_class: sentences a class of the embedded task.
        seed: fixes every split.
    """

    source: str = EMBEDDED_TASK
    subset: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    selection_share: float = 0.1
    test_share: float = 0.2
    limit: int | None = None
    per_class: int = 1500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("selection_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose a share between 0 and 1, such as 0.1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; choose 1 or more examples, or leave it out")
        if self.per_class < 20:
            raise UserError(f"per_class is {self.per_class}; choose 20 or more sentences a class")


@dataclass(frozen=True)
class TaskData:
    """A task ready for tokens.

    Attributes:
        train: trains; columns ``text``, ``text_pair`` (pairs only) and ``label`` (int).
        selection: a slice of train; chooses checkpoints and settings.
        test: is reported, and chooses nothing.
        label_names: class names in the order of the integers.
        identity: source and content hash, for logs and artifacts.
    """

    train: Dataset
    selection: Dataset
    test: Dataset
    label_names: list[str]
    identity: dict[str, Any]

    @property
    def is_pair(self) -> bool:
        """Whether every input is a pair of texts."""
        return "text_pair" in self.train.column_names


def load_task(config: DataConfig, label_names: list[str] | None = None) -> TaskData:
    """Read, check and split a task.

    Args:
        config: where it is and what its columns are called.
        label_names: classes of a ready classifier, which fix the integers; by default the sorted labels of train.

    Raises:
        UserError: an unknown source, column or label, or an empty text.
    """
    raw = _read(config)
    columns = _columns(raw, config)
    splits = _split({name: _rename(split, columns) for name, split in raw.items()}, config)
    if config.limit is not None and config.limit < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(seed=config.seed).select(range(config.limit))
    names = label_names or _label_names(splits["train"], raw, columns)
    encoded = {name: _encode(split, names, name) for name, split in splits.items()}
    identity = {"source": _source_name(config), "sha256": _content_hash(encoded), "labels": len(names)}
    identity |= {name: len(split) for name, split in encoded.items()}
    if config.source == EMBEDDED_TASK:
        identity["libraries"] = library_versions()
    return TaskData(encoded["train"], encoded["selection"], encoded["test"], names, identity)


def _source_name(config: DataConfig) -> str:
    path = Path(config.source)
    return path.name if path.exists() else "/".join(filter(None, [config.source, config.subset]))


def _read(config: DataConfig) -> dict[str, Dataset]:
    if config.source == EMBEDDED_TASK:
        return dict(build_docstring_task(config.seed, config.per_class))
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return {"all": _read_file(path)}
    if path.suffix in SUFFIXES or path.is_absolute() or config.source.startswith((".", "~")):
        raise UserError(
            f"no file or folder {config.source!r}; name an existing one, '{EMBEDDED_TASK}', or a hub data set"
        )
    try:
        loaded = load_dataset(config.source, config.subset)
    except Exception as error:
        raise UserError(
            f"unknown data {config.source!r} ({type(error).__name__}: {str(error).splitlines()[0]}); name "
            f"'{EMBEDDED_TASK}', a file ({', '.join(SUFFIXES)}), a folder with train and dev files, or a hub data set"
        ) from None
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"all": loaded}


def _read_folder(folder: Path) -> dict[str, Dataset]:
    found = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    if "train" not in found or not {"dev", "validation", "test"} & set(found):
        raise UserError(
            f"folder {str(folder)!r} holds {sorted(found) or 'no data files'}; it needs train and dev (or test) as one of "
            f"{', '.join(SUFFIXES)}"
        )
    return {name: _read_file(found[name]) for name in ("train", "dev", "validation", "test") if name in found}


def _read_file(file: Path) -> Dataset:
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"{str(file)!r} ends in {file.suffix!r}; known: {', '.join(SUFFIXES)}; convert it to one of these"
        )
    try:
        if file.suffix in (".csv", ".tsv"):
            # In a TSV quotes are text, as GLUE has it; a byte-order mark is not.
            dialect: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
            frame = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", **dialect)
            return Dataset.from_pandas(frame, preserve_index=False)
        if file.suffix == ".parquet":
            return Dataset.from_parquet(str(file))
        if file.suffix == ".arrow":
            return Dataset.from_file(str(file))
        return Dataset.from_json(str(file))
    except Exception as error:
        raise UserError(f"cannot read {str(file)!r}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def _columns(raw: dict[str, Dataset], config: DataConfig) -> dict[str, str]:
    present = next(iter(raw.values())).column_names

    def find(given: str | None, usual: tuple[str, ...], kind: str, required: bool) -> str | None:
        if given is not None:
            if given not in present:
                raise UserError(
                    f"unknown {kind} {given!r}; columns of {config.source}: {', '.join(present)}; name one of these"
                )
            return given
        match = next((name for name in usual if name in present), None)
        if match is None and required:
            raise UserError(
                f"{config.source} has no {kind} by a usual name ({', '.join(usual)}); its columns: {', '.join(present)}; "
                f"name one with --data.{kind}"
            )
        return match

    columns = {
        "text": find(config.text_column, TEXT_COLUMNS, "text_column", True),
        "text_pair": find(config.pair_column, PAIR_COLUMNS, "pair_column", False),
        "label": find(config.label_column, LABEL_COLUMNS, "label_column", True),
    }
    return {role: name for role, name in columns.items() if name is not None}


def _rename(split: Dataset, columns: dict[str, str]) -> Dataset:
    missing = [name for name in columns.values() if name not in split.column_names]
    if missing:
        raise UserError(
            f"a split lacks column {missing[0]!r}; its columns: {', '.join(split.column_names)}; give every split the same"
        )
    return split.select_columns(list(columns.values())).rename_columns(
        {name: role for role, name in columns.items() if name != role}
    )


def _split(raw: dict[str, Dataset], config: DataConfig) -> dict[str, Dataset]:
    if "selection" in raw:
        return raw
    if "all" in raw or len(raw) == 1:
        parts = next(iter(raw.values())).train_test_split(test_size=config.test_share, seed=config.seed)
        train, test = parts["train"], parts["test"]
    else:
        train = raw["train"]
        held_out = next((name for name in ("dev", "validation", "validation_matched", "test") if name in raw), None)
        if held_out is None:
            raise UserError(f"{config.source} has splits {', '.join(raw)}; it needs train and validation, dev or test")
        test = raw[held_out]
    held = max(1, min(MAX_SELECTION, round(config.selection_share * len(train))))
    parts = train.train_test_split(test_size=held, seed=config.seed)
    return {"train": parts["train"], "selection": parts["test"], "test": test}


def _label_names(train: Dataset, raw: dict[str, Dataset], columns: dict[str, str]) -> list[str]:
    feature = next(iter(raw.values())).features[columns["label"]]
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = sorted({str(label) for label in train["label"]}, key=lambda name: (not name.isdigit(), name.zfill(12)))
    if len(labels) < 2:
        raise UserError(f"train has the label {labels} only; a classifier needs two or more")
    if len(labels) > max(50, len(train) // 5):
        raise UserError(
            f"column {columns['label']!r} has {len(labels)} values in {len(train)} rows; name a column of classes"
        )
    return labels


def _encode(split: Dataset, names: list[str], split_name: str) -> Dataset:
    index = {name: position for position, name in enumerate(names)}
    encoded = []
    for row, label in enumerate(split["label"]):
        position = index.get(str(label), int(label) if str(label).isdigit() else -1)
        if not 0 <= position < len(names):
            raise UserError(
                f"{split_name} row {row} has the label {label!r}, which is not in the label set: {', '.join(names)}; "
                "mend the row, or tune a task model on these labels"
            )
        encoded.append(position)
    columns = {name: list(split[name]) for name in ("text", "text_pair") if name in split.column_names}
    for column, texts in columns.items():
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{split_name} row {row} has an empty {column} ({text!r}); fill it or remove the row")
    return Dataset.from_dict({**columns, "label": encoded})


def _content_hash(splits: dict[str, Dataset]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(name.encode())
        for row in split:
            digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()
