"""The plain model in other programs, each with its documented way to classify many texts."""

# No postponed annotations here, because Ray Data reads those of the class.
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import transformers
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.bulk.settings import BATCH, LENGTH, Settings
from benchmarks.bulk.workloads import Workload


class Pipeline:
    """A loop over ``transformers.pipeline`` that reads and writes Parquet.

    Args:
        workload: the model and the rows.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.pipeline = transformers.pipeline("text-classification", str(workload.folder), device="cpu")

    def rows_per_second(self, output: Path) -> float:
        """Classify all rows."""
        started = time.perf_counter()
        table = parquet.read_table(self.workload.file)
        texts = table["text"].to_pylist()
        answers = list(self.pipeline(texts, batch_size=BATCH, truncation=True, max_length=LENGTH))
        table = table.append_column("label", pa.array([answer["label"] for answer in answers]))
        table = table.append_column("score", pa.array([answer["score"] for answer in answers]))
        parquet.write_table(table, output)
        return len(texts) / (time.perf_counter() - started)


class PlainModel:
    """The class that Ray Data's guide to batch inference calls with every batch.

    Args:
        model: folder of the task model.
        threads: CPU threads.
        clock: file that gets the time of the first batch, before which the model was loaded.
    """

    def __init__(self, model: str, threads: int, clock: Path) -> None:
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.clock = clock

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if not self.clock.exists():
            self.clock.write_text(str(time.time()))
        tokens = self.tokenizer(
            list(batch["text"]), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )  # each (B, S)
        with torch.inference_mode():
            score, label = self.model(**tokens).logits.softmax(-1).max(-1)  # (B,) both
        names = self.model.config.id2label
        return batch | {"label": np.array([names[index] for index in label.tolist()]), "score": score.numpy()}


def ray_data(workload: Workload, settings: Settings, output: Path) -> float:
    """Classify all rows with ``map_batches`` on a pool of one actor; returns rows per second since the first batch."""
    clock = output.with_suffix(".clock")
    rows = ray.data.read_parquet(str(workload.file)).map_batches(
        PlainModel,
        fn_constructor_args=(str(workload.folder), settings.threads, clock),
        batch_size=BATCH,
        num_cpus=settings.threads,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows.write_parquet(str(output))
    seconds = time.time() - float(clock.read_text())
    clock.unlink()
    return workload.rows / seconds


def infinity(workload: Workload, settings: Settings) -> float:
    """Classify all rows with Infinity; returns rows per second without reading and writing of files.

    Raises:
        subprocess.CalledProcessError: Infinity does not run on this machine.
    """
    texts = workload.folder.with_name(f"{workload.key}-texts.json")
    texts.write_text(json.dumps(workload.texts))
    quiet = {"HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [
            str(settings.infinity),
            str(Path(__file__).with_name("infinity.py")),
            str(workload.folder),
            str(texts),
            str(BATCH),
            str(settings.threads),
        ],
        env=environment | quiet | {"OMP_NUM_THREADS": str(settings.threads)},
        cwd=workload.folder.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = next(line for line in found.stdout.splitlines() if line.startswith("seconds "))
    return workload.rows / float(seconds.split()[1])
