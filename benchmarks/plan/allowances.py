"""One plan per allowance, all chosen from the same trained adapters: the promised loss and the verified loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.plan.tasks import Planned
from benchmarks.trained import fill_store
from revmux.plan.build import Plan, describe_system, train_recipes, unrounded, verify_widths
from revmux.plan.choose import Choice, Judged, choose
from revmux.plan.config import Goal, MeasureConfig
from revmux.plan.front import mark_front
from revmux.plan.measure import Bench
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
    bench, untouched = (
        Bench(pretrained, pretrained.tokenize(split, max_length), store, measuring)
        for split, store in ((choosing.test, first.store), (task.test, unrounded(first.store)))
    )
    siso, candidates = bench.siso(), bench.measured(bench.candidates(adapters))
    rows = []
    for allowance in allowances:
        choice = choose(siso, candidates, Goal(allowance), measuring.seed)
        folder = planned.folder / f"allowance-{allowance:g}"
        served = verify_widths(choice, untouched, folder)
        compared = mark_front([one.candidate.row(float(siso.mean())) for one in choice.judged])
        rows.append(_row(planned.name, Plan(choice, served, compared, folder), allowance))
        print(f"{planned.name}, {allowance:g} points: {rows[-1]['outcome']}", flush=True)
    identity = task.identity | {"train": len(choosing.train), "choosing": len(choosing.test)}
    return {"rows": rows, "task": identity, "backbone": dict(pretrained.identity)}


def ratio_name(allowance: float, task: str) -> str:
    """Return the quotient that a row measures, as text."""
    return f"verified loss / allowance of {allowance:g} points, {task}"


def _row(name: str, plan: Plan, allowance: float) -> dict[str, Any]:
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
        "method": system.method,
        "num_inputs": system.num_inputs,
        "prefill_layers": system.prefill_layers,
        "threshold": system.threshold,
        "fallback": system.fallback,
        "widths": [one.num_inputs for one in plan.served],
        "choosing_inputs": len(system.correct),
        "promised_loss": promise.judged.loss,
        "promised_bound": promise.judged.bound,
        "verified_loss": seen.loss,
        "verified_lower": seen.lower,
        "verified_upper": seen.upper,
        "verified_inputs": seen.inputs,
        "proven": seen.proven,
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
    kind = plan.served[-1].judged.candidate.kind
    if kind.is_plain:
        return "ships the plain model (SISO): nothing else is surely inside the allowance and cheaper"
    what = "multiplexing" if kind.multiplexes() else "an exit head, no multiplexing"
    return f"ships {what}: {describe_system(plan.served[-1].judged)}"


def _best_multiplexed(choice: Choice) -> dict[str, Any] | None:
    """Return the multiplexed system cheaper than SISO with the lowest loss bound; None if none is cheaper."""
    saving: list[Judged] = [one for one in choice.judged if one.candidate.num_inputs > 1 and one.candidate.cost < 1]
    if not saving:
        return None
    best = min(saving, key=lambda one: one.bound)
    return {
        "name": best.candidate.name,
        "loss": best.loss,
        "loss_bound": best.bound,
        "cost": best.candidate.cost,
        "fits": best.fits,
    }
