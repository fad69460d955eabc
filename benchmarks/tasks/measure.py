"""The rows of the benchmark. Legs alternate within one run, and every ratio divides two legs of the same round."""

from __future__ import annotations

import asyncio
import statistics
from time import perf_counter

import torch

from benchmarks.rows import ratio_row
from benchmarks.tasks.replica import Replica
from benchmarks.tasks.settings import Row, Settings
from revmux.backbone import Backbone
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained

MEMORY_TARGET, COLD_TARGET, MIXED_TARGET, TOGETHER_TARGET = 1.2, 100.0, 0.7, 2.5


def measure_memory(replica: Replica) -> list[Row]:
    """Return the row on the memory per task."""
    counted = replica.service.tasks.memory.added[replica.names[-1]].total
    row = ratio_row(
        f"memory per task of {len(replica.names):,} / size of its files",
        [replica.bytes_per_task / replica.file_bytes],
        MEMORY_TARGET,
    )
    return [
        row
        | {
            "bound": "at most",
            "bytes": round(replica.bytes_per_task),
            "counted_bytes": counted,
            "file_bytes": replica.file_bytes,
        }
    ]


def measure_cold(replica: Replica) -> list[Row]:
    """Return the row on the start of tasks that are not loaded: each replaces the one that was not used for longest."""

    async def starts() -> list[float]:
        found = []
        for name in replica.cold:
            started = perf_counter()
            await replica.service.tasks.get(name)
            found.append(1000 * (perf_counter() - started))
        return found

    row = ratio_row(f"start of a cold task beside {len(replica.names):,}, ms", asyncio.run(starts()), COLD_TARGET)
    return [row | {"bound": "at most"}]


def measure_mixed(replica: Replica) -> list[Row]:
    """Return the row on traffic for all tasks against as much traffic for one."""
    settings, names = replica.settings, list(replica.service.engine.tasks)

    async def one(number: int) -> object:
        return await replica.ask(number, [names[0]])

    async def mixed(number: int) -> object:
        return await replica.ask(number, [names[number % len(names)]])

    legs: dict[str, list[float]] = {"one": [], "mixed": []}
    for send in (one, mixed):  # a warm-up: one-time work is not measured
        replica.per_second(send, settings.clients, settings.clients)
    for _ in range(settings.rounds):
        for name, send in (("one", one), ("mixed", mixed)):
            legs[name].append(replica.per_second(send, settings.requests, settings.clients))
    row = ratio_row(
        f"throughput: traffic over {len(names):,} tasks / for one task",
        [mine / alone for mine, alone in zip(legs["mixed"], legs["one"])],
        MIXED_TARGET,
    )
    return [row | _medians(legs) | _about(settings)]


def measure_together(replica: Replica) -> list[Row]:
    """Return the rows on requests that name several tasks against one request per task."""
    settings = replica.settings
    names = list(replica.service.engine.tasks)[: settings.together]

    async def together(number: int) -> object:
        return await replica.ask(number, names)

    async def apart(number: int) -> object:
        return await replica.ask(number // len(names), [names[number % len(names)]])

    rows = []
    for clients, target in ((1, TOGETHER_TARGET), (settings.clients, None)):
        texts = -(-settings.requests // len(names))
        legs: dict[str, list[float]] = {"together": [], "apart": []}
        replica.per_second(together, clients, clients)
        for _ in range(settings.rounds):
            legs["together"].append(replica.per_second(together, texts, clients))
            legs["apart"].append(replica.per_second(apart, texts * len(names), clients) / len(names))
        row = ratio_row(
            f"throughput, {clients} client{'s' * (clients > 1)}: {len(names)} tasks per request / {len(names)} requests",
            [joint / alone for joint, alone in zip(legs["together"], legs["apart"])],
            target,
        )
        rows.append(row | _medians(legs) | _about(settings) | {"clients": clients})
    return rows


def measure_unmerged(folder: str, replica: Replica) -> list[Row]:
    """Return the rows on the time of a plain pass with updates apart against merged ones."""
    settings = replica.settings
    task = next(iter(replica.service.engine.tasks.values()))
    apart = task.backbone
    merged = load_pretrained(BackboneConfig(folder)).backbone.freeze()
    rows = []
    for inputs in (1, settings.clients):
        tokens = task.pretrained.encode([replica.text(number) for number in range(inputs)])
        passes = max(1, settings.requests // inputs // 4)
        ratios = [_seconds(apart, tokens, passes) / _seconds(merged, tokens, passes) for _ in range(settings.rounds)]
        row = ratio_row(f"time of a pass of {inputs} input{'s' * (inputs > 1)}: LoRA apart / merged", ratios)
        rows.append(row | _about(settings))
    return rows


@torch.inference_mode()
def _seconds(backbone: Backbone, tokens: dict[str, torch.Tensor], passes: int) -> float:
    backbone(tokens)
    started = perf_counter()
    for _ in range(passes):
        backbone(tokens)
    return perf_counter() - started


def _medians(legs: dict[str, list[float]]) -> Row:
    return {"per_second": {name: round(statistics.median(found), 2) for name, found in legs.items()}}


def _about(settings: Settings) -> Row:
    return {"clients": settings.clients, "tokens": settings.tokens}
