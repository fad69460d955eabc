"""python -m benchmarks.tasks.routing: group widths with and without a replica for each task.

Several replicas serve many tasks on one base model with random weights. Clients in a closed loop ask all tasks equally
often. Once HAProxy sends each task to its replica, and once to the replica with the fewest requests, which knows nothing
of tasks. A wider group costs less per input, so the inputs per group say what the choice of the replica is worth.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from jsonargparse import ArgumentParser
from prometheus_client.parser import text_string_to_metric_families
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from benchmarks.rows import kept_rows, ratio_row
from benchmarks.serving.load import Load, send
from revmux.adapters.folder import describe_adapter, save_adapter
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run
from serve_app.config import server_config
from serve_app.run import deploy, shutdown
from serve_app.task_affinity import VARIABLE

RESULT = Path("benchmarks/results/routing.json")
KEPT = Path("runs/routing")
WORDS = [f"w{index}" for index in range(200)]
LENGTH = 32  # tokens that a task accepts
TARGET = 2.0


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        tasks: number of tasks.
        replicas: number of replicas.
        connections: requests in flight.
        requests: requests per leg.
        width: N of the adapter.
        port: TCP port of the server.
    """

    tasks: int = 200
    replicas: int = 4
    connections: int = 800
    requests: int = 6000
    width: int = 4
    port: int = 8731


def write_task(folder: Path, width: int) -> tuple[Path, Path]:
    """Write a task model with random weights and an untrained adapter, and return both folders."""
    model = folder / "model"
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(model)
    BertTokenizer(str(model / "vocab.txt"), model_max_length=64).save_pretrained(model)
    pretrained = load_pretrained(BackboneConfig(model=str(model), max_length=LENGTH))
    adapters = build_method("token-split", BackboneShape.of(pretrained.backbone), width, {})
    classifier = MultiplexedClassifier(pretrained.backbone, adapters, 2)
    described = describe_adapter(classifier, pretrained, LENGTH, {"source": "random"})
    return model, save_adapter(classifier, described, folder / "adapter")


def measure(settings: Settings, by_task: bool) -> dict[str, float]:
    """Run one leg.

    Args:
        settings: settings of the benchmark.
        by_task: whether HAProxy sends each task to its replica.

    Returns:
        The inputs per group, the replicas that answered a task, and the requests per second.
    """
    if not by_task:
        os.environ[VARIABLE] = "0"
    with TemporaryDirectory(prefix="revmux-routing-") as folder:
        model, adapter = write_task(Path(folder), settings.width)
        task = {"model": str(model), "adapters": [str(adapter)]}
        names = [f"task-{number}" for number in range(settings.tasks)]
        config = server_config(
            tasks=dict.fromkeys(names, task),
            num_replicas=settings.replicas,
            num_cpus=(os.cpu_count() or 1) / settings.replicas,
            threads=1,
            port=settings.port,
            proxy="haproxy",
        )
        chosen = random.Random(0)
        bodies = [
            {"task": chosen.choice(names), "inputs": " ".join(chosen.choices(WORDS, k=24))}
            for _ in range(settings.requests)
        ]
        try:
            url = deploy(config, timeout_seconds=600)
            leg = send(Load(f"{url}/predict", bodies, settings.connections))
            counts = _counts(url)
        finally:
            shutdown()
            os.environ.pop(VARIABLE, None)
    inputs, groups = (sum(counts[f"revmux_{name}_total"].values()) for name in ("inputs", "groups"))
    answered = [key for key, number in counts["revmux_requests_total"].items() if number]
    return {
        "inputs_per_group": inputs / groups,
        "replicas_per_task": len(answered) / len({name for name, _ in answered}),
        "requests_per_second": leg.per_second,
        "p50_seconds": leg.p50,
    }


def _counts(url: str) -> dict[str, dict[tuple[str, str], float]]:
    """The counters of all replicas, by name and then by task and replica."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    page = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).raise_for_status().text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if "task" in sample.labels and "replica" in sample.labels:
                by_task = found.setdefault(sample.name, {})
                key = sample.labels["task"], sample.labels["replica"]
                by_task[key] = by_task.get(key, 0) + sample.value
    return found


def rows(settings: Settings, keep: Path) -> list[dict[str, Any]]:
    """Return the rows, from the legs that were kept and those that are measured now."""
    by_task, other = (
        kept_rows(keep, name, asdict(settings), lambda chosen=chosen: measure(settings, chosen))  # type: ignore[misc]
        for name, chosen in (("by-task", True), ("fewest-requests", False))
    )
    row = ratio_row(
        "inputs per group, each task on its replica / on the replica with the fewest requests",
        [by_task["inputs_per_group"] / other["inputs_per_group"]],
        TARGET,
    )
    return [row | {"by_task": by_task, "fewest_requests": other}]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has not been measured yet, then write the result file."""
    parser = ArgumentParser(prog="python -m benchmarks.tasks.routing", description="Group widths by choice of replica.")
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--result", type=Path, default=RESULT, help="result file to write")
    parser.add_argument("--keep", type=Path, default=KEPT, help="folder in which measured legs are kept")
    parsed = parser.parse_args(argv)
    settings = Settings(**{item.name: getattr(parsed, item.name) for item in fields(Settings)})
    found = rows(settings, parsed.keep)
    meta = describe_run("python -m benchmarks.tasks.routing", {"texts": "random words"}, {"weights": "random"})
    write_json(parsed.result, {"meta": meta | {"settings": asdict(settings)}, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
