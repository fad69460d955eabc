"""What a plan ships for each allowance, from the adapters of the first seed: with all systems, and without multiplexing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison.systems import Ready
from benchmarks.plan.allowances import outcome
from benchmarks.trained import Run
from revmux.methods import method_class
from revmux.plan.build import compare, train_recipes, unrounded, verify_served
from revmux.plan.choose import Judged
from revmux.plan.config import Goal, MeasureConfig
from revmux.plan.front import mark_front
from revmux.plan.measure import Bench
from revmux.plan.plan import Plan
from revmux.training.recipe import load_backbone

ALLOWANCES = (0.3, 0.5, 1.0, 3.0)
"""Points of accuracy that may be lost."""
MEASURE = MeasureConfig(shuffles=3, throughput_pairs=3)


def plan_rows(ready: Ready, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per allowance and set of systems.

    Args:
        ready: the task.
        runs: the runs whose adapters compete; they are trained.
    """
    recipes = [run.recipe for run in runs]
    adapters = train_recipes(recipes, ready.choosing, ready.folder / "adapters")
    pretrained = load_backbone(recipes[0], ready.task.label_names)
    pretrained.backbone.freeze()
    length = recipes[0].backbone.max_length
    untouched = Bench(pretrained, pretrained.tokenize(ready.task.test, length), unrounded(ready.store), MEASURE)
    alone = [
        adapter for adapter, recipe in zip(adapters, recipes) if not method_class(recipe.method.name).multiplexes()
    ]
    rows = []
    for kind, chosen in (("all systems", adapters), ("without multiplexing", alone)):
        comparison = compare(chosen, pretrained, ready.choosing, length, ready.store, MEASURE)
        for allowance in ALLOWANCES:
            choice = comparison.choose(Goal(allowance))
            folder = plan_folder(ready, kind, allowance)
            served = verify_served(choice, untouched, folder)
            compared = mark_front([one.candidate.row(float(comparison.search_siso.mean())) for one in choice.judged])
            plan = Plan(choice, served, compared, folder)
            rows.append(_row(ready.name, kind, allowance, plan, comparison.compared))
            print(f"{ready.name}, {kind}, {allowance:g} points: {rows[-1]['outcome']}", flush=True)
    return rows


def plan_folder(ready: Ready, systems: str, allowance: float) -> Path:
    """The folder of a plan, which has the adapters of its stages.

    Args:
        ready: the task.
        systems: the systems that were compared.
        allowance: points that may be lost.
    """
    return ready.folder / f"plan-{systems.split()[0]}-{allowance:g}"


def _row(task: str, systems: str, allowance: float, plan: Plan, compared: int) -> dict[str, Any]:
    promise: Judged = plan.served[-1].judged  # the plain model always meets a goal that is only an allowance
    seen, system = plan.served[-1].verification, plan.served[-1].judged.candidate
    return {
        "table": "plan",
        "task": task,
        "systems": systems,
        "allowance": allowance,
        "outcome": outcome(plan),
        "verdict": seen.outcome,
        "stages": [
            {
                "method": stage.method,
                "num_inputs": stage.num_inputs,
                "prefill_layers": stage.prefill_layers,
                "options": dict(stage.options),
                "threshold": stage.threshold,
            }
            for stage in system.stages
        ],
        "num_inputs": system.num_inputs,
        "fallback": system.fallback,
        "compared": compared,
        "promised_loss": promise.best_loss,
        "promised_bound": promise.bound,
        "verified_loss": seen.loss,
        "verified_lower": seen.lower,
        "verified_upper": seen.upper,
        "verified_inputs": seen.inputs,
        "accuracy_mean": seen.accuracy,
        "siso_accuracy": seen.siso_accuracy,
        "cost_counted": system.cost_counted,
        "throughput_ratio": system.throughput_ratio,
    }
