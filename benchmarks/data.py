"""Peak memory and time of data that grows fiftyfold: reading, splitting, tokenizing, and training on the stored tokens.

python -m benchmarks.data
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.rows import kept_rows, ratio_row, verdict
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.features.tokens import TokenizedTask, tokenize_task
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.identity import resolve
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import prepare
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, KEPT = Path("benchmarks/results/data.json"), Path("runs/data")
SIZES = (100_000, 200_000, 5_000_000)
TIMED_SIZE = 200_000
STORED_SIZES = (20_000, 1_000_000)
WORDS, SHORTEST, LONGEST, MAX_LENGTH = 20_000, 6, 15, 24
STEPS, BATCH = 200, 64
SETTINGS = (SIZES, TIMED_SIZE, STORED_SIZES, WORDS, SHORTEST, LONGEST, MAX_LENGTH, STEPS, BATCH)


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Let the processes that are started in the block use an empty cache folder."""
    former = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if former is not None:
            os.environ["XDG_CACHE_HOME"] = former


class EnoughSteps(Exception):
    """Ends a training run."""


def write_sentences(file: Path, size: int) -> None:
    """Write a CSV file of random sentences of two classes, all different, in which some words are much more frequent."""
    generator = np.random.default_rng(0)
    vocabulary = AutoTokenizer.from_pretrained(resolve("all-MiniLM-L6-v2")).get_vocab()
    names = np.array(sorted(word for word in vocabulary if word.isalpha() and word.isascii())[:WORDS], dtype=object)
    with file.open("w") as lines:
        lines.write("text,label\n")
        for start in range(0, size, 10_000):
            count = min(10_000, size - start)
            lengths = generator.integers(SHORTEST, LONGEST + 1, count)
            words = names[generator.zipf(1.2, int(lengths.sum())) % len(names)]
            ends = lengths.cumsum()
            for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
                lines.write(f"{' '.join(words[end - length : end])} {start + row},{(start + row) % 2}\n")


def write_model(folder: Path) -> None:
    """Save a tiny BERT with random weights and the tokenizer of all-MiniLM-L6-v2."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.id2label, config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("all-MiniLM-L6-v2")).save_pretrained(folder)


def recipe_of(folder: Path, size: int, budget_gb: float) -> Recipe:
    """Return a run on the sentences of one size."""
    return Recipe(
        BackboneConfig(str(folder / "model"), max_length=MAX_LENGTH),
        DataConfig(source=str(folder / f"{size}.csv")),
        MethodConfig("revmux", 2, 1),
        OptimConfig(epochs=1, batch_size=BATCH),
        store=StoreConfig(root=str(folder / "store"), budget_gb=budget_gb),
    )


def peak_megabytes() -> float:
    """Return the largest resident memory of this process so far, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("error: this system does not report peak memory; run this benchmark on Linux")


def drive(recipe: Recipe) -> dict[str, Any]:
    """Do the driver's part: read, split and check the data, and store its tokens."""
    started = time.perf_counter()
    task = load_task(recipe.data)
    loaded = time.perf_counter()
    tokens = tokenize_task(task, recipe.backbone, recipe.store)
    ended = time.perf_counter()
    return {"tokens": tokens, "load_seconds": loaded - started, "token_seconds": ended - loaded}


def work(recipe: Recipe, tokens: TokenizedTask, first: int) -> dict[str, Any]:
    """Do a worker's part: open the tokens and features, and train some steps from step ``first`` of the epoch."""
    started = time.perf_counter()
    prepared = prepare(recipe, tokens)
    opened = time.perf_counter()

    def on_step(step: int, total: int, metrics: dict[str, Any]) -> None:
        if step == STEPS:
            raise EnoughSteps

    trainer = prepared.trainer(on_step=on_step)
    trainer.state.epoch_step = first
    try:
        for _ in trainer.run():
            pass
    except EnoughSteps:
        pass
    return {"open_seconds": opened - started, "train_seconds": time.perf_counter() - opened}


def fill(recipe: Recipe, tokens: TokenizedTask) -> dict[str, Any]:
    """Store the features."""
    prepare(recipe, tokens)
    return {}


def _run(results: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    found = function(*arguments)
    results.put(found | {"megabytes": peak_megabytes()})


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what a function returns in a new process, with the peak memory of that process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(results, function, arguments))
    process.start()
    process.join()
    found: dict[str, Any] = results.get(timeout=60)
    return found


def memory_row(name: str, megabytes: dict[int, float]) -> dict[str, Any]:
    """Return the row of the peak memory at the largest size relative to that at the smallest."""
    smallest, largest = min(megabytes), max(megabytes)
    ratio = megabytes[largest] / megabytes[smallest]
    row = ratio_row(f"{name}, {largest:,} examples / {smallest:,}", [ratio], 1.1)
    return row | {"bound": "at most", "megabytes": {str(size): round(value) for size, value in megabytes.items()}}


def measure_tokens(size: int) -> dict[str, float]:
    """Return the peak megabytes of the driver, and of a worker on stored tokens."""
    driven: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        tokens = driven_on(folder, size, driven)
        worked = alone(work, recipe_of(folder, size, budget_gb=0), tokens, size // BATCH // 2)
    return {"driver": driven[0]["megabytes"], "worker": worked["megabytes"]}


def measure_features(size: int) -> dict[str, float]:
    """Return the peak megabytes of a worker on stored features."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        recipe = recipe_of(folder, size, budget_gb=100)
        tokens = driven_on(folder, size, [])
        alone(fill, recipe, tokens)
        return {"worker": alone(work, recipe, tokens, 0)["megabytes"]}


def driven_on(folder: Path, size: int, found: list[dict[str, Any]]) -> TokenizedTask:
    """Run the driver's part on new data, append what it measured, and return the tokens."""
    if not (folder / f"{size}.csv").is_file():
        write_sentences(folder / f"{size}.csv", size)
    with cache_in(folder / f"cache-{size}"):
        found.append(alone(drive, recipe_of(folder, size, budget_gb=0)))
    tokens: TokenizedTask = found[-1]["tokens"]
    return tokens


def measure_seconds() -> list[dict[str, Any]]:
    """Return the rows of the first start against a restart."""
    driven: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for _ in range(2):
            tokens = driven_on(folder, TIMED_SIZE, driven)
        opened = alone(work, recipe_of(folder, TIMED_SIZE, budget_gb=0), tokens, 0)["open_seconds"]
    rows = []
    for name, what in (("load_seconds", "read, split and check"), ("token_seconds", "tokenize")):
        first, later = (one[name] for one in driven)
        row = ratio_row(f"seconds to {what}, first start / restart", [first / later])
        rows.append(row | {"examples": TIMED_SIZE, "seconds": {"first": round(first, 1), "restart": round(later, 1)}})
    ready = {"name": "seconds until a worker has opened tokens and model", "target": None, "examples": TIMED_SIZE}
    return [*rows, ready | {"seconds": {"worker": round(opened, 1)}}]


def data_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the table of the page and how it was measured."""
    lines = ["| measured | target | result |", "|---|---|---|"]
    for row in result["rows"]:
        target = "–" if row["target"] is None else f"≤ {row['target']:g}"
        if "megabytes" in row:
            sizes = ", ".join(f"{size} MB at {int(rows):,}" for rows, size in row["megabytes"].items())
            found = f"{row['ratio_median']:.2f} ({sizes}): {verdict(row)}"
        else:
            seconds = ", ".join(f"{value:g} s ({name})" for name, value in row["seconds"].items())
            found = f"{seconds}, {row['examples']:,} examples"
        lines.append(f"| {row['name']} | {target} | {found} |")
    meta = result["meta"]
    data, machine = meta["data"], meta["machine"]
    how = (
        f"Random sentences of {data['words'][0]} to {data['words'][1]} words and a number, in one CSV file; a tiny BERT; "
        f"{data['steps']} training steps, those without stored features from the middle of the epoch. Each process was measured "
        f"alone. {machine['cores']} cores, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    return {"data": "\n".join(lines) + f"\n\n{how}\n"}


def main() -> None:
    """Measure, then write the result file."""
    on_tokens = {size: kept_rows(KEPT, f"tokens-{size}", SETTINGS, partial(measure_tokens, size)) for size in SIZES}
    on_features = {
        size: kept_rows(KEPT, f"features-{size}", SETTINGS, partial(measure_features, size)) for size in STORED_SIZES
    }
    rows = [
        memory_row(
            "peak memory of the driver, which reads, splits and tokenizes",
            {size: found["driver"] for size, found in on_tokens.items()},
        ),
        memory_row(
            "peak memory of a worker on stored tokens", {size: found["worker"] for size, found in on_tokens.items()}
        ),
        memory_row(
            "peak memory of a worker on stored tokens and features",
            {size: found["worker"] for size, found in on_features.items()},
        ),
        *kept_rows(KEPT, "seconds", SETTINGS, measure_seconds),
    ]
    data = {"source": "random sentences", "words": [SHORTEST, LONGEST], "steps": STEPS}
    backbone = {"name": "BERT with 2 layers of width 32 and random weights"}
    write_json(RESULT, {"meta": describe_run("python -m benchmarks.data", data, backbone), "rows": rows})


if __name__ == "__main__":
    main()
