"""Register a plan in MLflow: a model version per stage, and aliases for the systems that users ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ray_jobs.tracking.pyfunc import MODEL_NAME
from ray_jobs.tracking.tracker import Tracker
from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.files import write_stages
from revmux.plan.plan import Plan

CHAMPION, FAST, EXACT = "champion", "fast", "exact"
Versions = dict[str, list[str]]
"""The versions of the stages of each registered system, by its name in the plan."""


def register_plan(tracker: Tracker, name: str, plan: Plan, backbone: str, pairs: bool) -> Versions:
    """Register the served systems and both ends of the front; versions of an earlier call are reused.

    The alias ``champion`` is the plan's choice, ``fast`` the cheapest system that was compared, and ``exact`` the most
    accurate one with an adapter. The later stages of a ladder have the aliases ``champion-2`` and so on. There is no
    champion if the plan chooses SISO or misses its goal.

    Args:
        tracker: tracker of the runs that trained the adapters.
        name: name of the registered model.
        plan: the plan with its choice.
        backbone: see :func:`ray_jobs.tracking.pyfunc.save_pyfunc`.
        pairs: whether an input is a pair of texts.
    """
    known = versions(tracker, name)
    made: Versions = {}
    ends = _ends(plan)
    wanted = [one.judged.candidate for one in plan.served] + list(ends.values())
    for system in {one.name: one for one in wanted if not one.is_plain}.values():
        if any(stage.run_id is None for stage in system.stages):
            continue
        folders = write_stages(system, plan.folder / "registered" / system.name)
        made[system.name] = []
        for number, (stage, folder) in enumerate(zip(system.stages, folders), 1):
            tags = tags_of(system, stage, number)
            if tags["system"] not in known:
                assert stage.run_id is not None
                artifact = MODEL_NAME if stage.threshold is None else f"{MODEL_NAME}-{stage.threshold_name}"
                artifact += f"-stage{number}" if number > 1 else ""
                known[tags["system"]] = tracker.register(
                    stage.run_id, Path(folder), name, tags, backbone, pairs, artifact
                )
            made[system.name].append(known[tags["system"]])
    _set_aliases(tracker, name, made, plan, ends)
    return made


def _ends(plan: Plan) -> dict[str, Candidate]:
    """The cheapest and the most accurate system with an adapter, by alias."""
    systems = [one.candidate for one in plan.choice.judged if not one.candidate.is_plain]
    if not systems:
        return {}
    return {
        FAST: min(systems, key=lambda one: (one.cost, -one.accuracy, one.name)),
        EXACT: max(systems, key=lambda one: (one.accuracy, -one.cost, one.name)),
    }


def tags_of(system: Candidate, stage: PlannedStage, number: int) -> dict[str, str]:
    """Tags by which users choose a version."""
    return {
        "system": f"{stage.run_id}/{stage.name}" + (f"/stage{number}" if number > 1 else ""),
        "stage": str(number),
        "method": stage.method,
        "num_inputs": str(stage.num_inputs),
        "prefill_layers": str(stage.prefill_layers),
        "infonce_weight": f"{stage.infonce_weight:g}",
        "accuracy": f"{system.accuracy:.4f}",
        "cost_counted": f"{system.cost_counted:.4f}",
        "throughput_ratio": "none" if system.throughput_ratio is None else f"{system.throughput_ratio:.4f}",
        "fallback_threshold": "none" if stage.threshold is None else f"{stage.threshold:g}",
        "confidence": "plain" if stage.deferral is None else "learned",
        "fallback_share": f"{stage.going_on:.4f}",
    }


def versions(tracker: Tracker, name: str) -> dict[str, str]:
    """Versions of a registered model, by their tag ``system``."""
    found = tracker.client.search_model_versions(f"name = '{name}'")
    return {version.tags["system"]: str(version.version) for version in found if "system" in version.tags}


def _set_aliases(
    tracker: Tracker, name: str, made: Mapping[str, list[str]], plan: Plan, ends: Mapping[str, Candidate]
) -> None:
    if not made:
        return
    systems = dict(ends)
    chosen = plan.choice.chosen
    if plan.is_met and chosen is not None:
        systems[CHAMPION] = chosen.candidate
    aliases = {
        alias_of(alias, number): version
        for alias, system in systems.items()
        for number, version in enumerate(made.get(system.name, []), 1)
    }
    for former in tracker.client.get_registered_model(name).aliases:
        if former not in aliases and former.partition("-")[0] in (CHAMPION, FAST, EXACT):
            tracker.client.delete_registered_model_alias(name, former)
    for alias, version in aliases.items():
        tracker.client.set_registered_model_alias(name, alias, version)


def alias_of(alias: str, number: int) -> str:
    """The alias of a stage: that of its system for the first one, followed by the number for later ones."""
    return alias if number == 1 else f"{alias}-{number}"


def model_uris(plan: Plan, name: str, made: Mapping[str, list[str]]) -> list[str]:
    """The model URI that a server loads for each adapter: the champion's by alias, narrower widths' by version."""
    uris = []
    for one in plan.served:
        system = one.judged.candidate
        for number, folder in enumerate(one.folders, 1):
            if system.name not in made:
                uris.append(folder)
            elif plan.choice.chosen is not None and system.name == plan.choice.chosen.candidate.name:
                uris.append(f"models:/{name}@{alias_of(CHAMPION, number)}")
            else:
                uris.append(f"models:/{name}/{made[system.name][number - 1]}")
    return uris
