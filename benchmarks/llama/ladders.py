"""Ladders of the trained adapters: the most faithful one for each cost, with all systems and with early exits alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.comparison.systems import Ready, System
from benchmarks.rows import kept_file, kept_rows
from benchmarks.trained import Run
from revmux.adapters.folder import load_adapter
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.features.store import open_features
from revmux.ladder import Ladder, Stage
from revmux.methods import method_class
from revmux.model import plain_classifier
from revmux.plan.candidate import Candidate
from revmux.plan.config import MeasureConfig
from revmux.plan.measure import Bench, TrainedAdapter
from revmux.plan.search import search
from revmux.pretrained.pretrained import Pretrained
from revmux.training.ladder_evaluation import evaluate_ladder
from revmux.training.recipe import load_backbone

COSTS = (0.5, 0.65, 0.8)
"""Most operations per input, relative to SISO."""
STAGES = 2
KINDS = ("all systems", "early exits alone")
_HEAD = {"kind": "ladders", "title": "Ladder", "method": "ladder", "recipe": "strong"}


def ladder_rows(
    found: Sequence[tuple[System, Run]], ready: Ready, timing: MeasureConfig, measures: bool
) -> list[dict[str, Any]]:
    """One row per cost and kind of systems, for the finished runs of the first seed with the recipe strong.

    Thresholds are chosen on the choosing set, whose labels are the teacher's answers, and measured on the test split.

    Args:
        found: the runs.
        ready: the teacher with unlabelled inputs.
        timing: how throughput is measured.
        measures: whether ladders that have not been measured for these runs are; otherwise they are null.
    """
    runs = [
        run
        for system, run in found
        if run.is_done and run.recipe.optim.seed == 0 and system.recipe == "strong" and "without" not in system.title
    ]
    settings = ([run.asked for run in runs], COSTS, STAGES)
    if not runs or not (measures or kept_file(ready.folder, "ladder-stages", settings).is_file()):
        return unmeasured_ladders()
    chosen = kept_rows(ready.folder, "ladder-stages", settings, partial(_choose, runs, ready))
    rows = []
    for number, one in enumerate(chosen):
        name, asked = f"ladder-{number}", (settings, one, timing)
        if measures or kept_file(ready.folder, name, asked).is_file():
            rows.append(_HEAD | kept_rows(ready.folder, name, asked, partial(_measure, one, runs[0], ready, timing)))
    keys = {(row["systems"], row["most_cost"]) for row in rows}
    return rows + [row for row in unmeasured_ladders() if (row["systems"], row["most_cost"]) not in keys]


def unmeasured_ladders() -> list[dict[str, Any]]:
    """The rows of ladders that have not been measured."""
    nothing = dict.fromkeys(
        ("accuracy_mean", "siso_agreement", "cost_counted", "throughput_ratio", "fallback", "stages")
    )
    why = "not measured yet, or no system is as cheap; python -m benchmarks.llama measures ladders after the systems"
    return [_HEAD | nothing | {"systems": kind, "most_cost": cost, "why": why} for kind in KINDS for cost in COSTS]


def _choose(runs: Sequence[Run], ready: Ready) -> list[dict[str, Any]]:
    """The stages of the best system at each cost."""
    pretrained = _frozen(runs[0], ready)
    split = pretrained.tokenize(ready.choosing.test, ready.backbone.max_length)
    bench = Bench(pretrained, split, ready.store, MeasureConfig(shuffles=1, throughput_inputs=0))
    folders = [json.loads(run.result.read_text())["adapter"] for run in runs]
    adapters = [TrainedAdapter(folder.rpartition("/")[2], folder) for folder in folders]
    scores = bench.scores(adapters, torch.arange(len(split)))
    chosen = []
    for kind in KINDS:
        allowed = [one for one in scores if kind == KINDS[0] or not method_class(one.stage.method).multiplexes()]
        front = search(allowed, bench.siso, max_stages=STAGES).front
        for cost in COSTS:
            within = [one for one in front if one.cost_counted <= cost]
            if within:
                best = max(within, key=lambda one: one.accuracy)
                chosen.append({"systems": kind, "most_cost": cost, "stages": _stages(best)})
    return chosen


def _stages(system: Candidate) -> list[dict[str, Any]]:
    return [
        {
            "method": stage.method,
            "num_inputs": stage.num_inputs,
            "prefill_layers": stage.prefill_layers,
            "options": dict(stage.options),
            "threshold": stage.threshold,
            "folder": stage.folder,
        }
        for stage in system.stages
    ]


def _measure(chosen: dict[str, Any], run: Run, ready: Ready, timing: MeasureConfig) -> dict[str, Any]:
    pretrained = _frozen(run, ready)
    ladder = Ladder(
        [Stage(load_adapter(stage["folder"], pretrained), stage["threshold"] or 0.0) for stage in chosen["stages"]]
    )
    split = pretrained.tokenize(ready.task.test, ready.backbone.max_length)
    layer = ladder.stages[0].model.prefill_layers
    features = open_features(pretrained, split, [layer], ready.store).at(layer)
    found = evaluate_ladder(ladder, features, shuffles=1, grouping="length")
    batches = like_length_batches(split, timing.throughput_inputs, timing.throughput_batch)
    ratio = paired_throughput(plain_classifier(pretrained.backbone), ladder, batches, timing.throughput_pairs)
    print(f"{ready.name}, ladder of {chosen['systems']} at {chosen['most_cost']}: {found.figures.accuracy_mean:.1%}")
    return chosen | {
        "stages": [{key: value for key, value in stage.items() if key != "folder"} for stage in chosen["stages"]],
        "num_inputs": max(stage["num_inputs"] for stage in chosen["stages"]),
        "seeds": 1,
        "fallback": found.going_on[-1],
        "going_on": list(found.going_on),
        "accuracy_mean": found.figures.accuracy_mean,
        "siso_accuracy": found.figures.siso_accuracy,
        "siso_agreement": found.figures.siso_agreement,
        "cost_counted": found.cost,
        "throughput_ratio": ratio.median,
        "throughput_pairs": asdict(ratio),
    }


def _frozen(run: Run, ready: Ready) -> Pretrained:
    pretrained = load_backbone(run.recipe, ready.task.label_names)
    pretrained.backbone.freeze()
    return pretrained
