"""python -m benchmarks.front --glue GLUE"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison.runs import by_system, fill_stores, measure_run, row_over_seeds, train_missing
from benchmarks.comparison.systems import Ready, System, named_runs
from benchmarks.front.plans import MEASURE, plan_rows
from benchmarks.front.plot import plot_front
from benchmarks.front.rivals import rival_rows
from benchmarks.front.smaller import ALLOWANCE, smaller_ladder_rows
from benchmarks.front.systems import SEEDS, SHUFFLES, ablations, recipe_of, systems
from benchmarks.front.tasks import TASKS, ready
from benchmarks.rows import kept_file, kept_rows
from benchmarks.trained import Run, siso_row
from revmux.adapters.folder import load_adapter
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.model import plain_classifier
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import MethodConfig
from revmux.training.recipe import load_backbone
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run, git_commit

RESULT, PLOT = Path("benchmarks/results/front.json"), Path("docs/images/front.png")
MIXED = MethodConfig("revmux", 4, 3)
"""The system that is combined with smaller weights."""
ABLATED = "sentiment"
"""The task of the ablation."""


def system_rows(found: Sequence[tuple[System, Run]], task: Ready) -> list[dict[str, Any]]:
    """One row per system and N: means over the seeds, their spread, and the throughput of the first seed's adapter."""
    together = by_system(found)
    first = [same[0][1] for same in together]
    ratios = kept_rows(task.folder, "throughput", [run.asked for run in first], partial(throughputs, first, task))
    return [
        {"table": "ablation" if same[0][0].ablation else "front"} | row_over_seeds(same) | ratios[run.result.stem]
        for same, run in zip(together, first, strict=True)
    ]


def throughputs(chosen: Sequence[Run], task: Ready) -> dict[str, Any]:
    """The throughput of each run's adapter relative to SISO, by the name of its result file."""
    pretrained = load_backbone(chosen[0].recipe, task.task.label_names)
    pretrained.backbone.freeze()
    plain = plain_classifier(pretrained.backbone)
    split = pretrained.tokenize(task.task.test, task.backbone.max_length)
    batches = like_length_batches(split, MEASURE.throughput_inputs, MEASURE.throughput_batch, "cpu")
    found = {}
    for run in chosen:
        model = load_adapter(json.loads(run.result.read_text())["adapter"], pretrained)
        ratio = paired_throughput(plain, model, batches, MEASURE.throughput_pairs)
        found[run.result.stem] = {"throughput_ratio": ratio.median, "throughput_pairs": asdict(ratio)}
    return found


def measure_task(
    name: str, glue: Path | None, seeds: int, processes: int, trains: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one task, and the identity of its data; no rows if no run is done."""
    task = ready(name, glue)
    chosen = [*systems(), *(ablations() if name == ABLATED else ())]
    found = named_runs(chosen, task, seeds, recipe_of)
    if trains:
        fill_stores(task, [run for _, run in found])
        train_missing([run for _, run in found], task, processes, measure=partial(measure_run, shuffles=SHUFFLES))
    if not any(run.is_done for _, run in found):
        return [], {}
    rows = system_rows(found, task)
    mixed = next((run for system, run in found if system.method == MIXED and run.is_done), None)
    epochs = TASKS[name].epochs_of(1)
    asked = (mixed and mixed.asked, epochs)
    if trains or kept_file(task.folder, "rivals", asked).is_file():
        rows += kept_rows(task.folder, "rivals", asked, partial(rival_rows, task, mixed, epochs, MEASURE))
    compete = [run for system, run in named_runs(chosen, task, 1, recipe_of) if run.is_done and not system.ablation]
    competing = ([run.asked for run in compete], MEASURE)
    plans = kept_rows(task.folder, "plans", competing, partial(plan_rows, task, compete))
    planned = next(row for row in plans if (row["systems"], row["allowance"]) == ("all systems", ALLOWANCE))
    key = (competing, ALLOWANCE, planned["stages"])
    rows += plans + kept_rows(task.folder, "smaller-ladder", key, partial(smaller_ladder_rows, task, planned))
    place = {"family": "bert", "backbone": f"{BackboneConfig().model}, tuned to the task", "task": name}
    siso = siso_row(rows[0]["siso_accuracy"]) | {"table": "front", "recipe": None, "lora_rank": 0, "exit_layer": None}
    identity = task.task.identity | {
        "commit": git_commit(),
        "train": len(task.choosing.train),
        "choosing": len(task.choosing.test),
    }
    return [place | row for row in [siso, *rows]], identity


def merged(measured: dict[str, list[dict[str, Any]]], identities: dict[str, Any]) -> dict[str, Any]:
    """The result file with the rows of the measured tasks; those of other tasks stay as they were committed."""
    kept: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {"meta": {"data": {}}, "rows": []}
    of_commit = {"commit": kept["meta"].get("commit")}
    data = {name: of_commit | identity for name, identity in kept["meta"]["data"].items()} | identities
    rows: dict[str, list[dict[str, Any]]] = {
        name: measured.get(name) or [row for row in kept["rows"] if row["task"] == name] for name in TASKS
    }
    meta = describe_run(
        "python -m benchmarks.front --glue GLUE", {name: data[name] for name in TASKS if name in data}, {}
    )
    meta["backbone"] = {"name": BackboneConfig().model, "tuned": "all layers, on each task"}
    return {"meta": meta, "rows": [row for name in TASKS for row in rows[name]]}


def main() -> None:
    """Measure what has not been measured yet, then write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front", description=__doc__)
    parser.add_argument("--glue", type=Path, help="folder that contains SST-2 and MRPC; without it, they are left out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to measure")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="most runs per system")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, with one thread each")
    parser.add_argument("--measured-only", action="store_true", help="train nothing; report the runs that are done")
    arguments = parser.parse_args()
    measured: dict[str, list[dict[str, Any]]] = {}
    identities: dict[str, Any] = {}
    for name in arguments.tasks:
        if TASKS[name].in_glue and arguments.glue is None:
            continue
        rows, identity = measure_task(
            name, arguments.glue, arguments.seeds, arguments.processes, not arguments.measured_only
        )
        if not rows:
            print(f"{name}: no run is done, so its committed rows stay; leave out --measured-only to train", flush=True)
            continue
        measured[name], identities[name] = rows, identity
        write_json(RESULT, merged(measured, identities))
    plot_front(json.loads(RESULT.read_text())["rows"], PLOT)


if __name__ == "__main__":
    main()
