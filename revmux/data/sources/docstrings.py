"""The task ``docstrings``: which installed library does this sentence document?

The texts are the first paragraphs of docstrings, which are available on every machine with the platform installed.
They are read from source files without importing them. Library names are masked. To prevent leakage from train to
test, all sentences of a module are in the same split, and of sentences that differ only in names and numbers one is
kept.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from revmux.data.config import DOCSTRINGS, DataConfig
from revmux.data.sources.base import SOURCES, Source
from revmux.errors import UserError

LIBRARIES: dict[str, tuple[str, str]] = {
    # label: (distribution, names that reveal the label)
    "pandas": ("pandas", r"pandas|pd"),
    "ray": ("ray", r"ray|raylet|rllib|anyscale"),
    "scipy": ("scipy", r"scipy"),
    "sqlalchemy": ("sqlalchemy", r"sqlalchemy|sa"),
    "torch": ("torch", r"torch\w*|pytorch|aten"),
    "transformers": ("transformers", r"transformers|huggingface|hugging|hf"),
}
MIN_WORDS, MAX_WORDS = 6, 60
SPLIT_SHARES = {"train": 0.60, "selection": 0.12, "test": 0.28}


@dataclass(frozen=True)
class DocstringSentence:
    """The first paragraph of one docstring, with its label and module."""

    text: str
    label: str
    module: str


@SOURCES.register(DOCSTRINGS)
class DocstringSource(Source):
    """The task, built from the libraries that are installed with the platform."""

    def claims(self, source: str) -> bool:
        """Whether ``source`` is the name of the task."""
        return source == DOCSTRINGS

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits train, selection and test."""
        return dict(build_docstring_task(config.seed, config.per_class))

    def identity(self) -> dict[str, Any]:
        """The versions of the libraries, which determine the text."""
        return {"libraries": library_versions()}


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries, which determine the text of the task.

    Raises:
        UserError: one of the libraries is not installed.
    """
    missing = [label for label in LIBRARIES if importlib.util.find_spec(label) is None]
    if missing:
        raise UserError(
            f"the task docstrings reads the sources of {', '.join(LIBRARIES)}, but {', '.join(missing)} is not "
            "installed; run: pip install 'revmux[all]', or name your own data"
        )
    return {label: importlib.metadata.version(distribution) for label, (distribution, _) in LIBRARIES.items()}


def read_sentences(label: str, seed: int = 0) -> Iterator[DocstringSentence]:
    """The first paragraphs of 6 to 60 words in one library's sources, with names masked, module by module.

    Args:
        label: a key of :data:`LIBRARIES`.
        seed: determines the order of the modules, so that the caller may stop early.

    Raises:
        UserError: the library is not installed as a package.
    """
    spec = importlib.util.find_spec(label)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"library {label!r} is not installed as a package; run: pip install {LIBRARIES[label][0]}")
    root = Path(next(iter(spec.submodule_search_locations)))
    mask = re.compile(rf"(?<![a-zA-Z])(?:{LIBRARIES[label][1]})(?![a-zA-Z])", re.IGNORECASE)
    modules = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for module in sorted(modules, key=lambda name: _fraction(seed, "order", name)):
        if any(part in module for part in ("tests/", "_vendor", "thirdparty")):
            continue
        for docstring in _docstrings(modules[module]):
            text = mask.sub("___", " ".join(docstring.strip().split("\n\n")[0].split()))
            if MIN_WORDS <= len(text.split()) <= MAX_WORDS and text.isprintable():
                yield DocstringSentence(text, label, f"{label}/{module}")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates that are not valid Python
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
            pending.extend(reversed(node.body))


def skeleton(text: str) -> str:
    """The plain words of a sentence, without identifiers, names and numbers."""
    return " ".join(word for word in re.findall(r"[^\s,.;:()`'\"]+", text) if word.isalpha() and word.islower())


def _fraction(seed: int, *parts: str) -> float:
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def build_docstring_task(seed: int = 0, per_class: int = 1500) -> DatasetDict:
    """The task as a data set with columns ``text`` and ``label`` (a class name), balanced in every split.

    Args:
        seed: determines the split of modules and the choice of sentences.
        per_class: number of sentences per class over all splits, or fewer if a library has fewer.

    Returns:
        The splits ``train``, ``selection`` (to choose checkpoints and settings) and ``test`` (reported only).

    Raises:
        UserError: a library is not installed.
    """
    library_versions()
    wanted = {split: int(per_class * share) for split, share in SPLIT_SHARES.items()}
    pools: dict[str, dict[str, list[str]]] = {split: {label: [] for label in LIBRARIES} for split in SPLIT_SHARES}
    seen: set[str] = set()
    for label in LIBRARIES:
        for sentence in read_sentences(label, seed):
            key = skeleton(sentence.text)
            if key in seen or len(key.split()) < MIN_WORDS // 2:
                continue
            seen.add(key)
            pools[_split_of(_fraction(seed, sentence.module))][label].append(sentence.text)
            if all(len(pools[split][label]) >= wanted[split] for split in wanted):
                break
    splits = {}
    for split, by_label in pools.items():
        size = min(wanted[split], *(len(texts) for texts in by_label.values()))
        rows = [(text, label) for label, texts in by_label.items() for text in texts[:size]]
        rows.sort(key=lambda row: _fraction(seed, "shuffle", row[0]))
        splits[split] = Dataset.from_dict({"text": [row[0] for row in rows], "label": [row[1] for row in rows]})
    return DatasetDict(splits)


def _split_of(fraction: float) -> str:
    for split, share in SPLIT_SHARES.items():
        if fraction < share:
            return split
        fraction -= share
    return "test"
