"""Tasks: labelled text that is read from its source, checked and split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from revmux.data.blocks import IN_MEMORY, blocks, stored
from revmux.data.columns import find_columns
from revmux.data.config import MAX_SELECTION, MAX_TEST, DataConfig
from revmux.data.content import content_digest
from revmux.data.sources import source_of
from revmux.data.split import hold_out
from revmux.errors import UserError


@dataclass(frozen=True)
class TaskData:
    """A task that is ready for tokenization. The columns are ``text``, ``text_pair`` (pairs only) and ``label`` (int).

    Attributes:
        train: the training set.
        selection: the selection set, a slice of train, to choose checkpoints and settings.
        test: the test set, used for reported results only.
        label_names: class names in the order of the integer labels.
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

    def without_train(self) -> TaskData:
        """The task without the texts of its train split, to be sent to another machine."""
        return replace(self, train=_empty(self.train), selection=_in_memory(self.selection), test=_in_memory(self.test))

    def with_test_only(self) -> TaskData:
        """The task with the texts of its test split alone, to be sent to another machine."""
        train, selection = _empty(self.train), _empty(self.selection)
        return replace(self, train=train, selection=selection, test=_in_memory(self.test))


def _in_memory(split: Dataset) -> Dataset:
    """A split whose rows are sent with it. Of a memory-mapped one, only the path of its file would be."""
    return Dataset(pa.concat_tables(blocks(split))) if len(split) else _empty(split)


def _empty(split: Dataset) -> Dataset:
    return Dataset.from_dict({name: [] for name in split.column_names})


def load_task(config: DataConfig, label_names: list[str] | None = None) -> TaskData:
    """Read, check and split a task.

    Args:
        config: the source, its columns and its splits.
        label_names: classes of an existing classifier, in the order of its integer labels. By default, the sorted
            labels of train.

    Raises:
        UserError: the source, a column or a label is unknown, or a text is empty.
    """
    source = source_of(config)
    raw = source.read(config)
    columns = find_columns(next(iter(raw.values())).column_names, config)
    splits = _split({name: _rename(split, columns) for name, split in raw.items()}, config)
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"{config.source}: the split {name} has no rows; add labelled rows to it")
    names = label_names or _label_names([splits["train"], splits["selection"]], columns["label"])
    if config.limit is not None and config.limit < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(seed=config.seed).select(range(config.limit))
    encoded = {name: _encode(split, names, name) for name, split in splits.items()}
    identity = {"source": source.name(config), "sha256": _content_hash(encoded), "labels": len(names)}
    identity |= {name: len(split) for name, split in encoded.items()}
    identity |= source.identity()
    return TaskData(encoded["train"], encoded["selection"], encoded["test"], names, identity)


def _rename(split: Dataset, columns: dict[str, str]) -> Dataset:
    missing = [name for name in columns.values() if name not in split.column_names]
    if missing:
        raise UserError(
            f"a split has no column {missing[0]!r}; its columns: {', '.join(split.column_names)}; "
            "use the same columns in every split"
        )
    renamed: Dataset = split.select_columns(list(columns.values())).rename_columns(
        {name: role for role, name in columns.items() if name != role}
    )
    return renamed


def _split(raw: dict[str, Dataset], config: DataConfig) -> dict[str, Dataset]:
    if "selection" in raw:
        return raw
    if "all" in raw or len(raw) == 1:
        rows = next(iter(raw.values()))
        train, test = _hold_out(rows, min(MAX_TEST, math.ceil(config.test_share * len(rows))), config)
    else:
        held_out = next((name for name in ("dev", "validation", "validation_matched", "test") if name in raw), None)
        if "train" not in raw or held_out is None:
            raise UserError(
                f"{config.source} has the splits {', '.join(raw)}; name data with train and one of validation, dev or test"
            )
        train, test = raw["train"], raw[held_out]
    train, selection = _hold_out(train, max(1, min(MAX_SELECTION, round(config.selection_share * len(train)))), config)
    return {"train": train, "selection": selection, "test": test}


def _hold_out(rows: Dataset, held: int, config: DataConfig) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise UserError(f"{config.source}: {len(rows)} labelled rows cannot be split; add rows")
    return hold_out(rows, held, config.seed)


def _label_names(splits: list[Dataset], column: str) -> list[str]:
    feature = splits[0].features["label"]
    if hasattr(feature, "names"):
        return list(feature.names)
    rows = sum(len(split) for split in splits)
    found = {label for split in splits for label in _labels(split, "train").values()}
    labels = sorted(found, key=lambda name: (not name.isdigit(), name.zfill(12) if name.isdigit() else name))
    if len(labels) < 2:
        raise UserError(f"train has only the labels {labels}; add rows with at least one other label")
    if len(labels) > max(50, rows // 5):
        raise UserError(
            f"column {column!r} has {len(labels)} distinct values in {rows} rows; name a column of class labels"
        )
    return labels


def _labels(split: Dataset, split_name: str) -> dict[Any, str]:
    """The class name of every distinct value in the column of the labels."""
    known = getattr(split.features["label"], "names", None)
    texts = {}
    for label in _distinct(split):
        if label is None or not str(label).strip() or (known is not None and not 0 <= label < len(known)):
            row = _first_row(split, label)
            raise UserError(f"{split_name} row {row} has no label ({label!r}); fill it or remove the row")
        texts[label] = str(label) if known is None else known[label]
    return texts


def _distinct(split: Dataset) -> list[Any]:
    """The distinct values in the column of the labels, in the order of their first rows."""
    return list(
        dict.fromkeys(label for block in blocks(split.select_columns("label")) for label in _unique(block["label"]))
    )


def _unique(labels: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = labels.unique().to_pylist()
    return values


def _encode(split: Dataset, names: list[str], split_name: str) -> Dataset:
    """The split with integer labels: in memory if it is small, otherwise memory-mapped."""
    index = {name: position for position, name in enumerate(names)}
    labels = _labels(split, split_name)
    if not index.keys() & set(labels.values()):
        # Numbers that are not class names are indices: 0 and 1 in a file, for the classes negative and positive.
        labels = {
            given: names[int(given)] if str(given).isdigit() and int(given) < len(names) else label
            for given, label in labels.items()
        }
    for given, label in labels.items():
        if label not in index:
            row = _first_row(split, given)
            raise UserError(
                f"{split_name} row {row} has the label {label!r}, which is not in the label set: {', '.join(names)}; "
                "fix the row, or tune a task model on these labels"
            )
    encoded = _encoded_blocks(split, {given: index[label] for given, label in labels.items()}, split_name)
    if len(split) <= IN_MEMORY:
        return Dataset(pa.concat_tables(encoded))
    key = hashlib.sha256(f"{content_digest(split)} labels {labels} of {names}".encode())
    return stored(key.hexdigest()[:32], encoded)


def _encoded_blocks(split: Dataset, codes: dict[Any, int], split_name: str) -> Iterator[pa.Table]:
    """The blocks of a split with checked texts and integer labels.

    Args:
        split: the rows.
        codes: the integer of every label.
        split_name: name of the split, for error messages.
    """
    columns = [name for name in ("text", "text_pair") if name in split.column_names]
    first = 0
    for block in blocks(split):
        for column in columns:
            _check_texts(block[column], column, split_name, first)
        given = block["label"].combine_chunks()
        known = pa.array(list(codes), given.type)
        labels = np.array(list(codes.values()))[pc.index_in(given, known).to_numpy()]
        texts: dict[str, Any] = {name: block[name].cast(pa.string()) for name in columns}
        yield pa.table(texts | {"label": labels})
        first += len(block)


def _check_texts(texts: pa.ChunkedArray, column: str, split_name: str, first: int) -> None:
    """Check that every text is a string with content.

    Raises:
        UserError: one is not; the message has its row.
    """
    if pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type):
        empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)
        place = pc.index(empty, True).as_py()
    else:
        place = 0
    if place >= 0:
        raise UserError(
            f"{split_name} row {first + place} has an empty {column} ({texts[place].as_py()!r}); fill it or remove the row"
        )


def _first_row(split: Dataset, label: Any) -> int:
    """The number of the first row that has this label."""
    values = (value for block in blocks(split.select_columns("label")) for value in block["label"].to_pylist())
    return next(row for row, value in enumerate(values) if value is label or value == label)


def _content_hash(splits: dict[str, Dataset]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name} {content_digest(split)}".encode())
    return digest.hexdigest()
