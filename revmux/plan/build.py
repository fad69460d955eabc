"""The plan: trained adapters in, the system to serve out, with its promise, its proof and its reasons in plain words.

On one machine :func:`plan_here` does it all; a cluster trains the adapters and calls :func:`make_plan`.
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
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.plan.choose import Choice, Judged, Verification, choose, verify
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.plan.front import FrontRow, mark_front
from revmux.plan.measure import Bench, TrainedAdapter, no_words
from revmux.plan.plots import plot_front_html, plot_front_png
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import Recipe
from revmux.training.recipe import load_backbone, prepare, train_here
from revmux.utils.files import atomic_folder, write_durably, write_json
from revmux.utils.run_info import describe_run

PLAN_NAME, PAGE_NAME = "plan.json", "plan.md"


@dataclass(frozen=True)
class Served:
    """One group width of the plan.

    Attributes:
        judged: the system with its loss on the inputs that chose it.
        verification: its one look at the test split.
        folder: adapter folder with its threshold, as a server loads it; None for SISO.
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
    """What is to be served, and why.

    Attributes:
        choice: how it was chosen.
        served: the widths to serve, narrowest first; the last is the promise. Empty where the goal cannot be met.
        rows: every system that was compared, with SISO, on the inputs that choose.
        folder: of the plan's files.
    """

    choice: Choice
    served: list[Served]
    rows: list[FrontRow]
    folder: Path

    @property
    def is_met(self) -> bool:
        """Whether a system met the goal, and kept its promise on the test split."""
        return bool(self.served) and all(one.verification.held for one in self.served)

    @property
    def adapters(self) -> list[str]:
        """Adapter folders to serve beside the plain model."""
        return [one.folder for one in self.served if one.folder is not None]

    def why_not(self) -> str:
        """Where the goal is missed: by how much, and what is nearest."""
        choice = self.choice
        if not self.served:
            assert choice.nearest is not None
            unit = "points of accuracy" if choice.shortfall_unit == "points" else "times SISO's throughput"
            return (
                f"the goal cannot be met: it is missed by {choice.shortfall:.2f} {unit}; nearest is "
                f"{describe_system(choice.nearest)}"
            )
        worst = max(self.served, key=lambda one: one.verification.loss)
        over = worst.verification.loss - (worst.verification.allowance or 0.0)
        return (
            f"the allowance was not kept on the test split: {worst.judged.candidate.name} lost "
            f"{worst.verification.loss:.2f} points, {over:.2f} more than allowed; nearest that loses nothing is the plain "
            "model (SISO); more inputs to choose by (choosing.share, choosing.limit) make the choice surer"
        )


def describe_system(one: Judged) -> str:
    """A system in words: what it is, what it costs, what it loses."""
    system = one.candidate
    what = system.kind.describe(system.num_inputs, system.prefill_layers)
    if system.kind.is_plain:
        return f"{what}, which loses nothing and saves nothing"
    if system.threshold is not None:
        what += f", falling back where it is less than {system.threshold:.1%} sure ({system.fallback:.0%} of answers)"
    return f"{what}: {1 / system.cost:.2f} times SISO's throughput, {one.loss:.2f} points lost, at most {one.bound:.2f}"


def for_choosing(task: TaskData, config: SplitConfig, seed: int = 0) -> TaskData:
    """The task as trials of a plan see it: where the test split was, a slice of train. The test split stays untouched.

    Raises:
        UserError: train is too small to be divided.
    """
    held = min(round(config.share * len(task.train)), config.limit)
    if held < 2 or len(task.train) - held < 2:
        raise UserError(f"train has {len(task.train)} examples, too few to choose by {held} of them; bring more")
    parts = task.train.train_test_split(test_size=held, seed=seed)
    digest = hashlib.sha256(f"{task.identity['sha256']} choosing {held} {seed}".encode()).hexdigest()
    identity = task.identity | {"sha256": digest, "train": len(parts["train"]), "test": held}
    return replace(task, train=parts["train"], test=parts["test"], identity=identity)


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
    tell: Callable[[str], None] = no_words,
) -> Plan:
    """Choose among trained adapters, exit heads and the plain model; verify once; write it all down.

    Args:
        adapters: trained on ``choosing.train``.
        pretrained: the frozen task model, on the device whose speed counts.
        choosing: as :func:`for_choosing` gives it; its test split chooses.
        task: the same task; its test split verifies.
        goal: what the user knows.
        folder: takes ``plan.json``, ``plan.md``, ``front.png``, ``front.html`` and the folder ``adapters``.
        max_length: tokens an input is cut to.
        store: of features.
        measure: how candidates are measured.
        command: noted in the files.
        tell: is told what is done, in words.
    """
    measure, store = measure or MeasureConfig(), store or StoreConfig()

    def bench_of(split: Dataset, kept: StoreConfig) -> Bench:
        return Bench(pretrained, pretrained.tokenize(split, max_length), kept, measure, tell)

    bench = bench_of(choosing.test, store)
    siso = bench.siso()
    choice = choose(siso, bench.measured(bench.candidates(adapters)), goal, measure.seed)
    rows = mark_front([one.candidate.row(float(siso.mean())) for one in choice.judged])
    tell("verify what was chosen on the test split")
    served = verify_widths(choice, bench_of(task.test, unrounded(store)), folder)
    plan = Plan(choice, served, rows, folder)
    write_plan(plan, describe_run(command, task.identity, dict(pretrained.identity)))
    return plan


def unrounded(store: StoreConfig) -> StoreConfig:
    """The same store of states as the server has them: a promise is not verified on rounded ones."""
    return replace(store, dtype="float32")


def verify_widths(choice: Choice, bench: Bench, folder: Path) -> list[Served]:
    """One look at the test split for every width, whose intervals together have the goal's confidence.

    Args:
        choice: as :func:`revmux.plan.choose.choose` made it.
        bench: the frozen task model with the test split.
        folder: takes the folder ``adapters``, each with its threshold.
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
    """A copy of an adapter folder that tells the server its threshold of fall-back."""
    config = replace(load_adapter_config(source), fallback_threshold=threshold)
    with atomic_folder(target) as temporary:
        for file in Path(source).iterdir():
            if file.name != CONFIG_NAME:
                (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2, sort_keys=True) + "\n")
    return target


def write_plan(plan: Plan, meta: dict[str, Any]) -> None:
    """``plan.json``, the page ``plan.md``, and the front as picture and interactive page."""
    write_json(plan.folder / PLAN_NAME, plan_dict(plan, meta))
    template = resources.files("revmux.plan").joinpath("plan.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(plan=plan, choice=plan.choice, meta=meta, describe=describe_system)
    write_durably(plan.folder / PAGE_NAME, page)
    title = f"{meta['data']['source']} on {meta['backbone']['name']}, on the inputs that choose"
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
    """JSON has no NaN."""
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
    """The whole plan in this process: train every recipe, choose, verify, write.

    Args:
        recipes: the points to try, on one backbone; those trained in an earlier call are kept.
        task: read by :func:`revmux.data.task.load_task`.
        goal: the loss allowed, or the throughput wanted.
        folder: of adapters and the plan's files.
        splitting: the inputs that choose.
        measure: how candidates are measured.
        device: where the model runs.
        command: noted in the files.

    Raises:
        UserError: no recipe, recipes of several backbones, or one that cannot be trained.
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
    """Train every recipe in this process; what an earlier call left in the folder is kept.

    Args:
        recipes: the points to try, on one backbone.
        choosing: as :func:`for_choosing` gives it; its train split trains.
        folder: takes a folder for each.
        device: where the model runs.

    Raises:
        UserError: no recipe, recipes of several backbones, or one that cannot be trained.
    """
    if not recipes:
        raise UserError("there is no recipe to try; give at least one")
    if any(recipe.backbone != recipes[0].backbone for recipe in recipes):
        raise UserError("the recipes name several backbones; plan one at a time")
    adapters = []
    for recipe in recipes:
        method = recipe.method
        text = f"{recipe!r}{choosing.identity['sha256']}"
        name = f"{method.name}-n{method.num_inputs}-l{method.prefill_layers}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        place = folder / name
        if not (place / CONFIG_NAME).is_file():
            prepared = prepare(recipe, choosing, device)
            figures = train_here(prepared).metrics()
            save_adapter(prepared.model, prepared.adapter_config(figures), place)
        adapters.append(TrainedAdapter(name, str(place), recipe.loss.infonce_weight))
    return adapters
