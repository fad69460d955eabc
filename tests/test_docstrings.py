"""The docstring task: balanced, without the names of its libraries, and the same for the same seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import DatasetDict

from revmux.data.config import DataConfig
from revmux.data.sources import docstrings as docstrings_module
from revmux.data.sources.docstrings import (
    LIBRARIES,
    SPLIT_SHARES,
    build_docstring_task,
    library_versions,
    read_sentences,
    skeleton,
)
from revmux.data.task import load_task


@pytest.fixture(scope="module")
def docstrings() -> DatasetDict:
    return build_docstring_task(seed=0, per_class=60)


def test_the_docstring_task_is_balanced(docstrings: DatasetDict) -> None:
    assert set(docstrings) == set(SPLIT_SHARES)
    for split, share in SPLIT_SHARES.items():
        labels = list(docstrings[split]["label"])
        counts = {label: labels.count(label) for label in LIBRARIES}
        assert set(counts.values()) == {int(60 * share)}, split
        assert len(labels) == len(LIBRARIES) * int(60 * share)
        assert labels != sorted(labels), "classes are mixed"


def test_the_docstring_task_masks_the_names_of_its_libraries(docstrings: DatasetDict) -> None:
    masked = 0
    for split in docstrings.values():
        for text, label in zip(split["text"], split["label"]):
            names = LIBRARIES[label][1]
            assert not re.search(rf"(?<![a-zA-Z])({names})(?![a-zA-Z])", text, re.IGNORECASE), text
            masked += "___" in text
    assert masked > 0


def test_the_splits_of_the_docstring_task_share_no_sentence(docstrings: DatasetDict) -> None:
    everything = [skeleton(text) for rows in docstrings.values() for text in rows["text"]]
    assert len(set(everything)) == len(everything), "sentences that differ only in names and numbers are kept once"
    assert skeleton("Return the 3 rows of `DataFrame`.") == skeleton("Return the 14 rows of `Series`.")


@pytest.fixture
def toy_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two libraries of 60 modules; one sentence occurs in all modules with different names and numbers."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings_module, "LIBRARIES", {"alib": ("alib", "alib|al"), "blib": ("blib", "blib")})
    monkeypatch.setattr(docstrings_module, "library_versions", dict)
    for name in ("alib", "blib"):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
        for index in range(60):
            word = "".join(chr(ord("a") + int(digit)) for digit in f"{index:02}")
            lines = [f'"""The {name} part {word} mends al rows of one {name[0]} table.\n\nMore of it."""']
            lines += [f'def f():\n    """Return the {index} columns of Frame{index} that were asked for."""']
            lines += [
                f'class C:\n    def m(self):\n        """Keep what {word} of {name[0]} said about all_{name}_rows."""'
            ]
            (tmp_path / name / f"m{index}.py").write_text("\n".join(lines))
        (tmp_path / name / "tests" / "t.py").write_text('"""A sentence of a test that is no documentation."""')
        (tmp_path / name / "template.py").write_text('"""A sentence that a template has."""\n{% if not python %}')


def test_a_library_is_read_module_by_module_with_its_names_masked(toy_libraries: None) -> None:
    sentences = list(read_sentences("alib"))
    assert len({sentence.module for sentence in sentences}) == 60
    assert [sentence.module for sentence in sentences] == [sentences[index // 3 * 3].module for index in range(180)], (
        "the three of a module come together"
    )
    found = {sentence.text for sentence in sentences if sentence.module == "alib/m12.py"}
    assert found == {
        "The ___ part bc mends ___ rows of one a table.",
        "Return the 12 columns of Frame12 that were asked for.",
        "Keep what bc of a said about all_____rows.",
    }
    assert [sentence.module for sentence in read_sentences("alib", 1)] != [sentence.module for sentence in sentences]


def test_a_module_is_in_one_split_and_a_sentence_occurs_once(toy_libraries: None) -> None:
    task = build_docstring_task(seed=0, per_class=60)
    homes: dict[str, set[str]] = {}
    texts: list[str] = []
    for split, rows in task.items():
        assert len(rows) > 0
        texts += rows["text"]
        for text, label in zip(rows["text"], rows["label"]):
            words = [word for word in text.split() if re.fullmatch("[a-j]{2}", word) and word not in ("be", "if")]
            if "columns" not in text:
                homes.setdefault(f"{label} {words[0]}", set()).add(split)
    assert len(homes) > 30
    assert all(len(splits) == 1 for splits in homes.values())
    assert sum("columns" in text for text in texts) <= 1, "these differ only in names and numbers"


def test_the_same_seed_gives_the_same_task(toy_libraries: None) -> None:
    first, second, other = (build_docstring_task(seed, per_class=60) for seed in (0, 0, 1))
    assert all(first[split][:] == second[split][:] for split in SPLIT_SHARES)
    assert set(first["test"]["text"]) != set(other["test"]["text"])


def test_the_docstring_task_loads_with_the_pinned_versions_of_its_libraries(
    docstrings: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revmux.data.sources.docstrings.build_docstring_task", lambda seed, per_class: docstrings)
    task = load_task(DataConfig("docstrings", per_class=60))
    assert task.label_names == sorted(LIBRARIES)
    assert list(task.test["text"]) == list(docstrings["test"]["text"])
    assert task.identity["libraries"] == library_versions()
    assert task.identity["source"] == "docstrings"
