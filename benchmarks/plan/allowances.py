"""One plan per allowance, all chosen from the same trained adapters: the promised loss and the verified loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.plan.tasks import Planned
from benchmarks.trained import fill_store
from revmux.plan.build import compare, train_recipes, unrounded, verify_served
from revmux.plan.choose import Choice, Judged
from revmux.plan.config import Goal, MeasureConfig
from revmux.plan.front import mark_front
from revmux.plan.measure import Bench
from revmux.plan.plan import Plan, describe_system
from revmux.training.recipe import load_backbone

ALLOWANCES = (0.5, 1.0, 3.0)
"""Points of accuracy that may be lost."""


def measure(planned: Planned, measuring: MeasureConfig, allowances: Sequence[float] = ALLOWANCES) -> dict[str, Any]:
    """Train the adapters once, measure them once, and choose and verify for each allowance.

    Returns:
        ``rows``, one per allowance, and the identities ``task`` and ``backbone``.
    """
    first, task, choosing = planned.recipes[0], planned.task, planned.choosing
    layers = sorted({recipe.method.prefill_layers for recipe in planned.recipes})
    for split in (choosing.train, choosing.selection, choosing.test):
        fill_store(first, split, layers)
    adapters = train_recipes(planned.recipes, choosing, planned.folder / "adapters")
    pretrained = load_backbone(first, task.label_names)
    pretrained.backbone.freeze()
    max_length = first.backbone.max_length
    comparison = compare(adapters, pretrained, choosing, max_length, first.store, measuring)
    untouched = Bench(pretrained, pretrained.tokenize(task.test, max_length), unrounded(first.store), measuring)
    rows = []
    for allowance in allowances:
        choice = comparison.choose(Goal(allowance))
        folder = planned.folder / f"allowance-{allowance:g}"
        served = verify_served(choice, untouched, folder)
        compared = mark_front([one.candidate.row(float(comparison.search_siso.mean())) for one in choice.judged])
        rows.append(_row(planned.name, Plan(choice, served, compared, folder), allowance, len(choosing.test)))
        print(f"{planned.name}, {allowance:g} points: {rows[-1]['outcome']}", flush=True)
    identity = task.identity | {"train": len(choosing.train), "choosing": len(choosing.test)}
    return {"rows": rows, "task": identity, "backbone": dict(pretrained.identity)}


def ratio_name(allowance: float, task: str) -> str:
    """Return the quotient that a row measures, as text."""
    return f"verified loss / allowance of {allowance:g} points, {task}"


def _row(name: str, plan: Plan, allowance: float, choosing: int) -> dict[str, Any]:
    """Return the promise, the verification, and the used share of the allowance (at most 1 if the promise was kept)."""
    promise = plan.served[-1]  # the plain model always meets a goal that is only an allowance
    system, seen = promise.judged.candidate, promise.verification
    return {
        "name": ratio_name(allowance, name),
        "target": 1.0,
        "bound": "at most",
        "ratio_median": round(seen.loss / allowance, 3),
        "ratio_min": round(seen.lower / allowance, 3),
        "ratio_max": round(seen.upper / allowance, 3),
        "spread": f"confidence interval, {seen.confidence:.0%}",
        "pairs": seen.inputs,
        "task": name,
        "allowance": allowance,
        "outcome": outcome(plan),
        "kept": plan.is_met,
        "method": system.first.method,
        "num_inputs": system.num_inputs,
        "prefill_layers": system.first.prefill_layers,
        "threshold": system.first.threshold,
        "fallback": system.fallback,
        "stages": [stage.name for stage in system.stages],
        "widths": [one.num_inputs for one in plan.served],
        "choosing_inputs": choosing,
        "promised_loss": promise.judged.best_loss,
        "promised_bound": promise.judged.bound,
        "verified_loss": seen.loss,
        "verified_lower": seen.lower,
        "verified_upper": seen.upper,
        "verified_inputs": seen.inputs,
        "proven": seen.outcome == "proven",
        "accuracy_mean": seen.accuracy,
        "siso_accuracy": seen.siso_accuracy,
        "cost_counted": system.cost_counted,
        "throughput_ratio": system.throughput_ratio,
        "multiplexed": _best_multiplexed(plan.choice),
    }


def outcome(plan: Plan) -> str:
    """Describe what is shipped or, if the promise was not kept, by how much it was missed."""
    if not plan.is_met:
        return f"ships nothing: {plan.why_not()}"
    system = plan.served[-1].judged.candidate
    if system.is_plain:
        return "ships the plain model (SISO): nothing else is surely inside the allowance and cheaper"
    what = "multiplexing" if system.multiplexes else "exit heads, no multiplexing"
    return f"ships {what}: {describe_system(plan.served[-1].judged)}"


def _best_multiplexed(choice: Choice) -> dict[str, Any] | None:
    """Return the multiplexed system cheaper than SISO with the lowest loss bound, or the lowest loss if none was tested; None if none is cheaper."""
    saving: list[Judged] = [one for one in choice.judged if one.candidate.multiplexes and one.candidate.cost < 1]
    if not saving:
        return None
    best = min(saving, key=lambda one: (one.bound is None, one.bound, one.search_loss))
    return {
        "name": best.candidate.name,
        "loss": best.best_loss,
        "loss_bound": best.bound,
        "cost": best.candidate.cost,
        "fits": best.fits,
    }
