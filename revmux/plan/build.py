"""The plan: chooses the system to serve among trained adapters, verifies it, and writes down the reasons.

On one machine, :func:`plan_here` also trains the adapters. A cluster job trains them itself and calls :func:`make_plan`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from datasets import Dataset

from revmux.adapters.config import CONFIG_NAME, load_adapter_config
from revmux.adapters.folder import save_adapter
from revmux.data.split import hold_out
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.plan.choose import Choice, Judged, Verification, choose, verify
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.plan.front import FrontRow, mark_front
from revmux.plan.measure import Bench, TrainedAdapter, log_nothing
from revmux.plan.plots import plot_front_html, plot_front_png
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import Recipe
from revmux.training.recipe import load_backbone, prepare, train_here
from revmux.utils.files import atomic_folder, write_durably, write_json
from revmux.utils.run_info import describe_run

PLAN_NAME, PAGE_NAME = "plan.json", "plan.md"


@dataclass(frozen=True)
class Served:
    """The system that a plan serves at one group width.

    Attributes:
        judged: the system with its loss on the choosing set.
        verification: its comparison with SISO on the test split.
        folder: adapter folder with the fallback threshold, as a server loads it; None for SISO.
    """

    judged: Judged
    verification: Verification
    folder: str | None

    @property
    def num_inputs(self) -> int:
        """N."""
        return self.judged.candidate.num_inputs


@dataclass(frozen=True)
class Plan:
    """The systems to serve, and why.

    Attributes:
        choice: how they were chosen.
        served: one system per width, narrowest first; the last is the chosen one. Empty if the goal cannot be met.
        rows: every system that was compared, SISO included, on the choosing set.
        folder: the folder of the plan's files.
    """

    choice: Choice
    served: list[Served]
    rows: list[FrontRow]
    folder: Path

    @property
    def is_met(self) -> bool:
        """Whether a system meets the goal and every served one stays inside the allowance on the test split."""
        return bool(self.served) and all(one.verification.held for one in self.served)

    @property
    def adapters(self) -> list[str]:
        """The adapter folders to serve alongside the plain model."""
        return [one.folder for one in self.served if one.folder is not None]

    def why_not(self) -> str:
        """If the goal is missed: by how much, and which system is nearest to it."""
        choice = self.choice
        if not self.served:
            assert choice.nearest is not None
            unit = "points of accuracy" if choice.shortfall_unit == "points" else "times SISO's throughput"
            return (
                f"the goal cannot be met: it is missed by {choice.shortfall:.2f} {unit}; the nearest system is "
                f"{describe_system(choice.nearest)}"
            )
        worst = max(self.served, key=lambda one: one.verification.loss)
        over = worst.verification.loss - (worst.verification.allowance or 0.0)
        return (
            f"the allowance was exceeded on the test split: {worst.judged.candidate.name} lost "
            f"{worst.verification.loss:.2f} points, {over:.2f} more than allowed; the plain model (SISO) loses nothing; a "
            "larger choosing set (choosing.share, choosing.limit) makes the choice more reliable"
        )


def describe_system(one: Judged) -> str:
    """A phrase about a system: what it is, how fast it is and how much it loses."""
    system = one.candidate
    what = system.kind.describe(system.num_inputs, system.prefill_layers)
    if system.kind.is_plain:
        return f"{what}, which loses nothing and saves nothing"
    if system.threshold is not None:
        what += f", falling back if its confidence is below {system.threshold:.1%} ({system.fallback:.0%} of answers)"
    return f"{what}: {1 / system.cost:.2f} times SISO's throughput, {one.loss:.2f} points lost, at most {one.bound:.2f}"


def for_choosing(task: TaskData, config: SplitConfig, seed: int = 0) -> TaskData:
    """The task that the trials of a plan use: its test split is the choosing set, a slice of the train split.

    The real test split is not part of it. A sentence and its phrases stay on the same side of the division.

    Raises:
        UserError: the train split is too small to be divided.
    """
    held = min(round(config.share * len(task.train)), config.limit)
    if held < 2 or len(task.train) - held < 2:
        raise UserError(
            f"the train split has {len(task.train)} examples, too few to hold {held} of them back as a choosing set; "
            "provide more"
        )
    train, choosing = hold_out(task.train, held, seed)
    digest = hashlib.sha256(f"{task.identity['sha256']} choosing by text {held} {seed}".encode()).hexdigest()
    identity = task.identity | {"sha256": digest, "train": len(train), "test": len(choosing)}
    return replace(task, train=train, test=choosing, identity=identity)


def make_plan(
    adapters: Sequence[TrainedAdapter],
    pretrained: Pretrained,
    choosing: TaskData,
    task: TaskData,
    goal: Goal,
    folder: Path,
    max_length: int,
    store: StoreConfig | None = None,
    measure: MeasureConfig | None = None,
    command: str = "",
    log: Callable[[str], None] = log_nothing,
) -> Plan:
    """Choose among trained adapters, exit heads and the plain model, verify the choice once, and write the plan's files.

    Args:
        adapters: trained on ``choosing.train``.
        pretrained: the frozen task model, on the device whose speed counts.
        choosing: as returned by :func:`for_choosing`; its test split is the choosing set.
        task: the same task with the real test split, which verifies.
        goal: the allowance or the throughput wanted.
        folder: where ``plan.json``, ``plan.md``, ``front.png``, ``front.html`` and the folder ``adapters`` are written.
        max_length: most tokens per input; longer inputs are truncated.
        store: where features are stored.
        measure: how candidates are measured.
        command: the command that made the plan, recorded in its files.
        log: called with a line of progress before each part of the work.
    """
    measure, store = measure or MeasureConfig(), store or StoreConfig()

    def bench_of(split: Dataset, split_store: StoreConfig) -> Bench:
        return Bench(pretrained, pretrained.tokenize(split, max_length), split_store, measure, log)

    bench = bench_of(choosing.test, store)
    siso = bench.siso()
    choice = choose(siso, bench.measured(bench.candidates(adapters)), goal, measure.seed)
    rows = mark_front([one.candidate.row(float(siso.mean())) for one in choice.judged])
    log("verifying the chosen systems on the test split")
    served = verify_widths(choice, bench_of(task.test, unrounded(store)), folder)
    plan = Plan(choice, served, rows, folder)
    write_plan(plan, describe_run(command, task.identity, dict(pretrained.identity)))
    return plan


def unrounded(store: StoreConfig) -> StoreConfig:
    """The same store in float32, so that verification uses the states that a server computes, not rounded ones."""
    return replace(store, dtype="float32")


def verify_widths(choice: Choice, bench: Bench, folder: Path) -> list[Served]:
    """Verify the system of every width once on the test split; all intervals together have the goal's confidence.

    Args:
        choice: as returned by :func:`revmux.plan.choose.choose`.
        bench: the frozen task model with the test split.
        folder: where the folder ``adapters`` is written, with one adapter folder per width.
    """
    if choice.chosen is None:
        return []
    goal = choice.goal
    each = replace(goal, confidence=1 - (1 - goal.confidence) / len(choice.widths))
    siso = bench.siso()
    served = []
    for one in choice.widths:
        system = one.candidate
        if system.folder is None:
            served.append(Served(one, verify(siso, None, each), None))
            continue
        correct = bench.answers(system.folder, system.threshold or 0.0).correct
        adapter = with_threshold(system.folder, system.threshold, folder / "adapters" / f"n{system.num_inputs}")
        served.append(Served(one, verify(siso, correct, each), str(adapter)))
    return served


def with_threshold(source: str | Path, threshold: float | None, target: Path) -> Path:
    """Copy an adapter folder and set its fallback threshold, which a server reads from there."""
    config = replace(load_adapter_config(source), fallback_threshold=threshold)
    with atomic_folder(target) as temporary:
        for file in Path(source).iterdir():
            if file.name != CONFIG_NAME:
                (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2, sort_keys=True) + "\n")
    return target


def write_plan(plan: Plan, meta: dict[str, Any]) -> None:
    """Write ``plan.json``, the page ``plan.md``, and the front as a picture and as an interactive page."""
    write_json(plan.folder / PLAN_NAME, plan_dict(plan, meta))
    template = resources.files("revmux.plan").joinpath("plan.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(plan=plan, choice=plan.choice, meta=meta, describe=describe_system)
    write_durably(plan.folder / PAGE_NAME, page)
    title = f"{meta['data']['source']} on {meta['backbone']['name']}, choosing set"
    plot_front_png(plan.rows, plan.folder / "front.png", title)
    plot_front_html(plan.rows, plan.folder / "front.html", title)


def plan_dict(plan: Plan, meta: dict[str, Any]) -> dict[str, Any]:
    """The plan as plain data."""
    choice = plan.choice
    bounds = {one.candidate.name: one for one in choice.judged}
    return {
        "meta": meta,
        "goal": asdict(choice.goal),
        "is_met": plan.is_met,
        "why_not": None if plan.is_met else plan.why_not(),
        "chosen": None if choice.chosen is None else choice.chosen.candidate.name,
        "served": [
            {
                "name": one.judged.candidate.name,
                "num_inputs": one.num_inputs,
                "threshold": one.judged.candidate.threshold,
                "adapter": one.folder,
                "promised_loss": one.judged.bound,
                "verification": asdict(one.verification),
            }
            for one in plan.served
        ],
        "systems": [
            _plain(asdict(row))
            | {"loss": bounds[row.name].loss, "loss_bound": bounds[row.name].bound, "fits": bounds[row.name].fits}
            for row in plan.rows
        ],
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values with NaN replaced by None, since JSON has no NaN."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in values.items()}


def plan_here(
    recipes: Sequence[Recipe],
    task: TaskData,
    goal: Goal,
    folder: Path,
    splitting: SplitConfig | None = None,
    measure: MeasureConfig | None = None,
    device: torch.device | str = "cpu",
    command: str = "",
) -> Plan:
    """Make a whole plan in this process: train every recipe, choose, verify, and write the plan's files.

    Args:
        recipes: the runs to compare, on one backbone; adapters from an earlier call are not trained again.
        task: loaded by :func:`revmux.data.task.load_task`.
        goal: the allowance or the throughput wanted.
        folder: where adapters and the plan's files are written.
        splitting: size of the choosing set.
        measure: how candidates are measured.
        device: where the model runs.
        command: the command that made the plan, recorded in its files.

    Raises:
        UserError: no recipe, recipes of several backbones, or a recipe that cannot be trained.
    """
    choosing = for_choosing(task, splitting or SplitConfig())
    adapters = train_recipes(recipes, choosing, folder / "trials", device)
    first = recipes[0]
    pretrained = load_backbone(first, task.label_names)
    pretrained.backbone.freeze().to(device)
    return make_plan(
        adapters, pretrained, choosing, task, goal, folder, first.backbone.max_length, first.store, measure, command
    )


def train_recipes(
    recipes: Sequence[Recipe], choosing: TaskData, folder: Path, device: torch.device | str = "cpu"
) -> list[TrainedAdapter]:
    """Train every recipe in this process, except those whose adapter is already in the folder.

    Args:
        recipes: the runs, on one backbone.
        choosing: as returned by :func:`for_choosing`; the adapters are trained on its train split.
        folder: where one adapter folder per recipe is written.
        device: where the model runs.

    Raises:
        UserError: no recipe, recipes of several backbones, or a recipe that cannot be trained.
    """
    if not recipes:
        raise UserError("there is no recipe to train (0 recipes); provide at least one")
    if any(recipe.backbone != recipes[0].backbone for recipe in recipes):
        raise UserError("the recipes have several backbones; plan for one at a time")
    adapters = []
    for recipe in recipes:
        method = recipe.method
        text = f"{recipe!r}{choosing.identity['sha256']}"
        name = f"{method.name}-n{method.num_inputs}-l{method.prefill_layers}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        target = folder / name
        if not (target / CONFIG_NAME).is_file():
            prepared = prepare(recipe, choosing, device)
            figures = train_here(prepared).metrics()
            save_adapter(prepared.model, prepared.adapter_config(figures), target)
        adapters.append(TrainedAdapter(name, str(target), recipe.loss.infonce_weight))
    return adapters
