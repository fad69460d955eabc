"""The files of a plan: ``plan.json``, the page ``plan.md``, plots of the front, and the adapter folders to serve."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from revmux.adapters.config import CONFIG_NAME, AdapterConfig, load_adapter_config
from revmux.estimate.price import price_per_million
from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.plan import Plan, describe_system
from revmux.plan.plots import plot_front_html, plot_front_png
from revmux.utils.copies import local_path
from revmux.utils.files import atomic_folder, write_durably, write_json

PLAN_NAME, PAGE_NAME = "plan.json", "plan.md"
PLAN_VERSION = 2
"""Version of ``plan.json``. Version 1 had no number and no learned confidences."""


def write_stages(system: Candidate, folder: Path) -> tuple[str, ...]:
    """Write one adapter folder per stage of a system; returns the folders in the order of the stages.

    Each folder has the stage's number, its threshold, and the share of its own inputs that go on (``share_on`` among the
    metrics), all of which a server reads from there.
    """
    folders, reached = [], 1.0
    for number, stage in enumerate(system.stages, 1):
        assert stage.folder is not None
        config = load_adapter_config(stage.folder)
        share_on = {} if stage.threshold is None else {"share_on": stage.going_on / reached if reached else 0.0}
        config = replace(
            config,
            fallback_threshold=stage.threshold,
            deferral=None if stage.deferral is None else asdict(stage.deferral),
            stage=number,
            metrics={**config.metrics, **share_on},
        )
        name = f"stage{number}-n{stage.num_inputs}" if system.is_ladder else f"n{stage.num_inputs}"
        folders.append(str(_copy_adapter(local_path(stage.folder), config, folder / name)))
        reached = stage.going_on
    return tuple(folders)


def _copy_adapter(source: Path, config: AdapterConfig, target: Path) -> Path:
    """Copy an adapter folder and change its config."""
    with atomic_folder(target) as temporary:
        for file in source.iterdir():
            if file.name != CONFIG_NAME:
                (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2, sort_keys=True) + "\n")
    return target


def write_plan(plan: Plan, meta: dict[str, Any], price: float | None = None) -> None:
    """Write ``plan.json``, the page ``plan.md``, and the front as a picture and as an interactive page.

    Args:
        plan: the plan.
        meta: what :func:`revmux.utils.run_info.describe_run` records.
        price: price of an hour of this hardware, in any currency, for the page; None leaves prices out.
    """
    write_json(plan.folder / PLAN_NAME, plan_dict(plan, meta))
    template = resources.files("revmux.plan").joinpath("plan.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        plan=plan, choice=plan.choice, meta=meta, describe=describe_system, price=price, per_million=price_per_million
    )
    write_durably(plan.folder / PAGE_NAME, page)
    title = f"{meta['data']['source']} on {meta['backbone']['name']}, choosing set"
    plot_front_png(plan.rows, plan.folder / "front.png", title)
    plot_front_html(plan.rows, plan.folder / "front.html", title)


def plan_dict(plan: Plan, meta: dict[str, Any]) -> dict[str, Any]:
    """The plan as plain data. Adapter folders are relative to the plan's, so that the plan can be moved or copied."""
    choice = plan.choice
    known = {one.candidate.name: one for one in choice.judged}
    return {
        "version": PLAN_VERSION,
        "meta": meta,
        "goal": asdict(choice.goal),
        "outcome": plan.outcome,
        "is_met": plan.is_met,
        "why_not": None if plan.is_met else plan.why_not(),
        "chosen": None if choice.chosen is None else choice.chosen.candidate.name,
        "compared": choice.compared,
        "siso_inputs_per_second": plan.siso_rate,
        "tested_on": choice.inputs,
        "served": [
            {
                "name": one.judged.candidate.name,
                "num_inputs": one.num_inputs,
                "stages": [
                    _stage_dict(stage) | {"adapter": os.path.relpath(folder, plan.folder)}
                    for stage, folder in zip(one.judged.candidate.stages, one.folders)
                ],
                "promised_loss": one.judged.bound,
                "verification": asdict(one.verification),
            }
            for one in plan.served
        ],
        "systems": [
            _plain(asdict(row))
            | {
                "stages": [_stage_dict(stage) for stage in known[row.name].candidate.stages],
                "search_loss": known[row.name].search_loss,
                "loss": known[row.name].loss,
                "loss_bound": known[row.name].bound,
                "fits": known[row.name].fits,
            }
            for row in plan.rows
        ],
    }


def _stage_dict(stage: PlannedStage) -> dict[str, Any]:
    """A stage as plain data."""
    return {
        "adapter_name": stage.adapter,
        "method": stage.method,
        "num_inputs": stage.num_inputs,
        "prefill_layers": stage.prefill_layers,
        "threshold": stage.threshold,
        "deferral": None if stage.deferral is None else asdict(stage.deferral),
        "going_on": stage.going_on,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values with NaN replaced by None, since JSON has no NaN."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in values.items()}
