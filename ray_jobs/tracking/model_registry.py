"""Register a plan's front in MLflow: a model version per point, and aliases for the points that users ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.tracking.pyfunc import MODEL_NAME
from ray_jobs.tracking.tracker import Tracker
from revmux.plan.build import Plan, with_threshold
from revmux.plan.choose import Candidate
from revmux.plan.front import front

CHAMPION, FAST, EXACT = "champion", "fast", "exact"


def register_plan(tracker: Tracker, name: str, plan: Plan, backbone: str, pairs: bool) -> dict[str, str]:
    """Register every adapter on the front and every served adapter; versions of an earlier call are reused.

    The alias ``champion`` is the plan's choice, ``fast`` the cheapest point of the front, and ``exact`` its most
    accurate adapter. There is no champion if the plan chooses SISO or misses its goal.

    Args:
        tracker: tracker of the runs that trained the adapters.
        name: name of the registered model.
        plan: the plan with its choice.
        backbone: see :func:`ray_jobs.tracking.pyfunc.save_pyfunc`.
        pairs: whether an input is a pair of texts.

    Returns:
        The version of every registered system, by its name in the plan.
    """
    on_front = {row.name for row in plan.rows if row.on_front}
    served = {one.judged.candidate.name for one in plan.served}
    systems = [
        one.candidate
        for one in plan.choice.judged
        if one.candidate.folder is not None and one.candidate.name in on_front | served
    ]
    known = versions(tracker, name)
    made = {}
    for system in systems:
        if system.run_id is None:
            continue
        tags = tags_of(system)
        if tags["system"] not in known:
            folder = plan.folder / "front" / system.name
            assert system.folder is not None
            with_threshold(system.folder, system.threshold, folder)
            artifact = MODEL_NAME if system.threshold is None else f"{MODEL_NAME}-{system.threshold:g}"
            known[tags["system"]] = tracker.register(system.run_id, folder, name, tags, backbone, pairs, artifact)
        made[system.name] = known[tags["system"]]
    _set_aliases(tracker, name, made, plan, systems)
    return made


def tags_of(system: Candidate) -> dict[str, str]:
    """Tags by which users choose a version."""
    return {
        "system": f"{system.run_id}/{system.name}",
        "method": system.method,
        "num_inputs": str(system.num_inputs),
        "prefill_layers": str(system.prefill_layers),
        "infonce_weight": f"{system.infonce_weight:g}",
        "accuracy": f"{system.accuracy:.4f}",
        "cost_counted": f"{system.cost_counted:.4f}",
        "throughput_ratio": "none" if system.throughput_ratio is None else f"{system.throughput_ratio:.4f}",
        "fallback_threshold": "none" if system.threshold is None else f"{system.threshold:g}",
        "fallback_share": f"{system.fallback:.4f}",
    }


def versions(tracker: Tracker, name: str) -> dict[str, str]:
    """Versions of a registered model, by their tag ``system``."""
    found = tracker.client.search_model_versions(f"name = '{name}'")
    return {version.tags["system"]: str(version.version) for version in found if "system" in version.tags}


def _set_aliases(tracker: Tracker, name: str, made: Mapping[str, str], plan: Plan, systems: list[Candidate]) -> None:
    points: list[Any] = [system for system in front(systems) if system.name in made]
    if not points:
        return
    aliases = {FAST: made[points[0].name], EXACT: made[points[-1].name]}
    chosen = plan.choice.chosen
    if plan.is_met and chosen is not None and chosen.candidate.name in made:
        aliases[CHAMPION] = made[chosen.candidate.name]
    else:
        tracker.client.delete_registered_model_alias(name, CHAMPION)
    for alias, version in aliases.items():
        tracker.client.set_registered_model_alias(name, alias, version)


def model_uris(plan: Plan, name: str, made: Mapping[str, str]) -> list[str]:
    """The model URI that a server loads for each width: the champion by its alias, narrower widths by version."""
    uris = []
    for one in plan.served:
        system = one.judged.candidate
        if one.folder is None:
            continue
        if system.name not in made:
            uris.append(str(Path(one.folder).absolute()))
        elif plan.choice.chosen is not None and system.name == plan.choice.chosen.candidate.name:
            uris.append(f"models:/{name}@{CHAMPION}")
        else:
            uris.append(f"models:/{name}/{made[system.name]}")
    return uris
