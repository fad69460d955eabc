"""The rows of one task: what has been measured, and for all other systems null and the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.comparison.runs import by_system, fill_stores, measure_run, row_over_seeds, train_missing
from benchmarks.comparison.systems import System, named_runs
from benchmarks.llama.ladders import ladder_rows, unmeasured_ladders
from benchmarks.llama.siso import labelled_recipe, labelled_systems, measure_labelled, plain_systems, untrained_rows
from benchmarks.llama.systems import recipe_of, systems
from benchmarks.llama.tasks import Taught
from benchmarks.rows import kept_file, kept_rows
from benchmarks.trained import Run
from revmux.methods import method_class
from revmux.plan.config import MeasureConfig

TIMING = MeasureConfig(throughput_inputs=32, throughput_batch=32, throughput_pairs=3)
LADDER = "ladder"
WHY = "not run yet; python -m benchmarks.llama measures it"
FIRST = 5
"""Systems that are measured before SISO's own tuning."""
FIGURES = ("accuracy_mean", "accuracy_std", "siso_agreement", "cost_counted", "throughput_ratio", "tunable_params")


def wanted(system: System, words: Sequence[str] | None) -> bool:
    """Whether a system's title and N contain one of these words; None stands for all."""
    name = f"{system.title} N={system.method.num_inputs}".lower()
    return words is None or any(word.lower() in name for word in words)


def measure_task(
    found: Taught, seeds: int, processes: int, threads: int, words: Sequence[str] | None, trains: bool
) -> list[dict[str, Any]]:
    """Measure what is missing of one task, and return all of its rows.

    Args:
        found: the task.
        seeds: most runs per system.
        processes: runs at the same time.
        threads: threads per run.
        words: parts of the titles of the systems to train, or ``ladder``; None measures everything.
        trains: whether anything is trained.
    """
    chosen = list(systems())
    on_teacher = named_runs(chosen, found.unlabelled, seeds, recipe_of)
    labelled = named_runs(list(labelled_systems()), found.labelled, seeds, labelled_recipe)
    if trains:
        train = partial(train_missing, processes=processes, threads=threads)
        asked = [run for system, run in on_teacher if wanted(system, words)]
        tuned = [run for system, run in labelled if wanted(system, words)]
        measure = partial(measure_run, timing=TIMING)
        train(asked[:FIRST], found.unlabelled, measure=measure)
        fill_stores(found.labelled, [run for run in tuned if not method_class(run.recipe.method.name).is_plain])
        train(tuned, found.labelled, measure=partial(measure_labelled, answers=found.answers, timing=TIMING))
        train(asked[FIRST:], found.unlabelled, measure=measure)
    settings = (found.labelled.choosing.identity["sha256"], found.unlabelled.choosing.identity["sha256"])
    plain = [unmeasured("siso", system) for system in plain_systems()]
    if trains or kept_file(found.unlabelled.folder, "siso", settings).is_file():
        kept = kept_rows(found.unlabelled.folder, "siso", settings, partial(untrained_rows, found))
        plain = [{"kind": "siso"} | row for row in kept]
    measures = trains and (words is None or LADDER in words)
    return [
        *plain,
        *_trained_rows("siso", labelled),
        *_trained_rows("systems", on_teacher),
        *ladder_rows(on_teacher, found.unlabelled, TIMING, measures),
    ]


def unmeasured_task() -> list[dict[str, Any]]:
    """The rows of a task of which nothing has been measured."""
    return [
        *(unmeasured("siso", system) for system in (*plain_systems(), *labelled_systems())),
        *(unmeasured("systems", system) for system in systems()),
        *unmeasured_ladders(),
    ]


def _trained_rows(kind: str, found: Sequence[tuple[System, Run]]) -> list[dict[str, Any]]:
    """A row per system: its figures, or null."""
    done = {(same[0][0].title, same[0][0].method.num_inputs): same for same in by_system(found)}
    rows = []
    for system in dict.fromkeys((one.title, one.method.num_inputs) for one, _ in found):
        if system in done:
            same = done[system]
            first = json.loads(same[0][1].result.read_text())
            own = {key: first[key] for key in ("throughput_ratio", "throughput_pairs", "seconds")}
            rows.append({"kind": kind} | row_over_seeds(same) | own)
        else:
            rows.append(unmeasured(kind, next(one for one, _ in found if (one.title, one.method.num_inputs) == system)))
    return rows


def unmeasured(kind: str, system: System) -> dict[str, Any]:
    """The row of a system that has not run."""
    method = system.method
    return {"kind": kind, **dict.fromkeys(FIGURES)} | {
        "title": system.title,
        "method": method.name,
        "recipe": system.recipe,
        "lora_rank": method.options.get("lora_rank", 0),
        "num_inputs": method.num_inputs,
        "prefill_layers": method.prefill_layers,
        "exit_layer": method.options.get("layer"),
        "seeds": 0,
        "why": WHY,
    }
