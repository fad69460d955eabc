"""Peak memory of training on stored features as the data set grows tenfold."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from benchmarks.rows import ratio_row
from benchmarks.training.backbones import MAX_LENGTH, small_task
from revmux.backbone import cut
from revmux.data.task import TaskData
from revmux.data.tokens import TokenizedSplit
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.identity import resolve
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.trainer import Trainer

SIZES = (5_000, 50_000)
SETTINGS = SIZES


def resident_megabytes() -> tuple[float, float]:
    """Return this process's resident memory, mapped shards included, and the anonymous part that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }
    return found["RssAnon"] + found["RssFile"], found["RssAnon"]


def numbered(task: TaskData, size: int) -> Iterator[dict[str, Any]]:
    """Yield the task's sentences repeatedly, each with a different number appended."""
    texts, labels = list(task.train["text"]), list(task.train["label"])
    for index in range(size):
        yield {"text": f"{texts[index % len(texts)]} {index}", "label": labels[index % len(labels)]}


def train_on(size: int, folder: str, fill: bool, results: Any) -> None:
    """Train one epoch on ``size`` examples; put the peak megabytes over all steps: total resident and anonymous."""
    torch.set_num_threads(1)
    task = small_task()
    names = dict(enumerate(task.label_names))
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    torch.manual_seed(0)
    backbone = cut(AutoModelForSequenceClassification.from_config(config)).freeze()
    tokenizer = AutoTokenizer.from_pretrained(resolve("all-MiniLM-L6-v2"))
    pretrained = Pretrained(backbone, tokenizer, {"name": "small", "revision": None, "sha256": None}, True)
    rows = Dataset.from_generator(numbered, gen_kwargs={"task": task, "size": size}, cache_dir=f"{folder}/texts")
    split = TokenizedSplit(rows, tokenizer, MAX_LENGTH)
    store = open_features(pretrained, split, [1], StoreConfig(root=f"{folder}/features"))
    if fill:
        return
    few = OnlineFeatures(TokenizedSplit(task.selection.select(range(8)), tokenizer, MAX_LENGTH), backbone)
    model = MultiplexedClassifier(backbone, build_method("revmux", BackboneShape.of(backbone), 2), 1)
    peaks = (0.0, 0.0)

    def on_step(step: int, total: int, metrics: dict[str, Any]) -> None:
        nonlocal peaks
        resident, own = resident_megabytes()
        peaks = max(peaks[0], resident), max(peaks[1], own)

    list(Trainer(model, store.at(1), few, OptimConfig(1, 64), LossConfig(), on_step).run())
    results.put(peaks)


def measure() -> list[dict[str, Any]]:
    """Return the row, with both peaks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            for fill in (
                True,
                False,
            ):  # the store is filled in a separate process, whose memory does not count as training's
                process = context.Process(target=train_on, args=(size, folder, fill, results))
                process.start()
                process.join()
            peaks[size] = results.get(timeout=60)
    (small, small_own), (large, large_own) = (peaks[size] for size in SIZES)
    row = ratio_row(f"peak memory of training on {SIZES[1]:,} examples / on {SIZES[0]:,}", [large / small], 1.1)
    row |= {"bound": "at most", "megabytes": {str(SIZES[0]): round(small), str(SIZES[1]): round(large)}}
    row |= {"own_megabytes": {str(SIZES[0]): round(small_own), str(SIZES[1]): round(large_own)}}
    print(f"{row['name']}: {row['ratio_median']} ({row['megabytes']} MB)", flush=True)
    return [row]
