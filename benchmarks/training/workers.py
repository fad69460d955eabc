"""Two workers with one thread each against one worker with one or two threads, and the share of time spent waiting."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rows import ratio_row
from benchmarks.training.backbones import MAX_LENGTH, embedded, small_task
from revmux.data.tokens import TokenizedSplit
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.trainer import Trainer

NUM_INPUTS, LAYER, BATCH = 2, 3, 32
PAIRS, EPOCHS = 3, 3
SETTINGS = (NUM_INPUTS, LAYER, BATCH, PAIRS, EPOCHS)


def work(rank: int, world: int, threads: int, store: str, meeting: str, epochs: int, results: Any) -> None:
    """Run one worker; put the inputs per second of each epoch except the first, and the worker's share of waiting.

    A thread that waits for the other worker sleeps, so waiting is the wall-clock time minus the processor time.
    """
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    task = small_task()
    pretrained = embedded(task)
    split = TokenizedSplit(task.train, pretrained.tokenizer, MAX_LENGTH)
    few = TokenizedSplit(task.selection.select(range(8)), pretrained.tokenizer, MAX_LENGTH)
    features = open_features(pretrained, split, [LAYER], StoreConfig(root=store)).at(LAYER)
    torch.manual_seed(0)
    method = build_method("revmux", BackboneShape.of(pretrained.backbone), NUM_INPUTS)
    model = MultiplexedClassifier(pretrained.backbone, method, LAYER)
    online = OnlineFeatures(few, pretrained.backbone)
    trainer = Trainer(model, features, online, OptimConfig(epochs + 1, BATCH), LossConfig())
    run = trainer.run()
    next(run)
    clock, processor = time.perf_counter(), time.process_time()
    rates = [report.metrics["inputs_per_second"] for report in run]
    waited = 1 - (time.process_time() - processor) / (time.perf_counter() - clock)
    results.put((rank, rates, waited))
    if world > 1:
        dist.destroy_process_group()


def run(world: int, threads: int, store: str, epochs: int) -> tuple[float, float]:
    """Return the median inputs per second over all workers, and the mean share of waiting."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, threads, store, str(Path(folder) / "meet"), epochs, results)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        found = sorted(results.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    return statistics.median(found[0][1]), statistics.fmean(waited for _, _, waited in found)


def measure() -> list[dict[str, Any]]:
    """Return the rows, with the waiting of two workers; for one worker it is time in which it was not scheduled."""
    with tempfile.TemporaryDirectory() as store:
        run(1, 1, store, 1)  # fills the store
        against_one, against_threads, waits, kept = [], [], [], []
        for _ in range(PAIRS):
            one, alone = run(1, 1, store, EPOCHS)
            two, waited = run(2, 1, store, EPOCHS)
            threaded, _ = run(1, 2, store, EPOCHS)
            against_one.append(two / one)
            against_threads.append(two / threaded)
            waits.append(waited)
            kept.append(alone)
    about = {"backbone": "all-MiniLM-L6-v2", "num_inputs": NUM_INPUTS, "prefill_layers": LAYER}
    waiting = {
        "waiting_median": round(statistics.median(waits), 3),
        "waiting": [round(value, 3) for value in waits],
        "waiting_of_one": [round(value, 3) for value in kept],
    }
    rows = [
        about | ratio_row("inputs per second: two workers / one worker, one thread each", against_one) | waiting,
        about
        | ratio_row(
            "inputs per second: two workers with one thread each / one worker with two threads", against_threads
        ),
    ]
    print(*(f"{row['name']}: {row['ratio_median']}" for row in rows), sep="\n", flush=True)
    return rows
