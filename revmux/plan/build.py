"""The plan: chooses the system to serve among trained adapters, verifies it, and writes down the reasons.

On one machine, :func:`plan_here` also trains the adapters. A cluster job trains them itself and calls :func:`make_plan`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revmux.adapters.config import CONFIG_NAME
from revmux.adapters.folder import save_adapter
from revmux.data.split import hold_out
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.plan.candidate import Candidate
from revmux.plan.choose import Choice, choose, safest_first, verify
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.plan.files import write_plan, write_stages
from revmux.plan.front import mark_front
from revmux.plan.interval import Floats
from revmux.plan.learn import first_stages, later_stages
from revmux.plan.measure import Bench, TrainedAdapter, divide, log_nothing
from revmux.plan.plan import Plan, Served
from revmux.plan.search import search
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import Recipe
from revmux.training.recipe import load_backbone, prepare, train_here
from revmux.utils.run_info import describe_run


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
    """Choose among trained adapters, their ladders and the plain model, verify the choice once, and write the plan's files.

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
    comparison = compare(adapters, pretrained, choosing, max_length, store, measure, log)
    choice = comparison.choose(goal)
    rows = mark_front([one.candidate.row(comparison.search_siso.mean()) for one in choice.judged])
    log("verifying the chosen systems on the test split")
    test = Bench(pretrained, pretrained.tokenize(task.test, max_length), unrounded(store), measure, log)
    plan = Plan(choice, verify_served(choice, test, folder), rows, folder, comparison.bench.siso_rate)
    write_plan(plan, describe_run(command, task.identity, dict(pretrained.identity)), measure.price)
    return plan


@dataclass(frozen=True)
class Comparison:
    """All systems that trained adapters can form, compared on the inputs of the search and ready to be tested.

    Attributes:
        bench: runs systems on the choosing set.
        search_siso: (M₁,) whether SISO was correct on each input of the search.
        siso: (M₂,) the same for the inputs of the tests.
        test_rows: rows of the choosing set that are the inputs of the tests.
        sequence: the systems to test, from the safest to the cheapest.
        others: single adapters without threshold that are not in the sequence.
        compared: number of systems from which the sequence was selected.
    """

    bench: Bench
    search_siso: Floats
    siso: Floats
    test_rows: Tensor
    sequence: list[Candidate]
    others: list[Candidate]
    compared: int
    _answers: dict[str, Floats] = field(default_factory=dict, init=False, repr=False)

    def choose(self, goal: Goal) -> Choice:
        """Choose for a goal. Each goal is a plan with a promise of its own."""
        return choose(self.search_siso, self.siso, self.sequence, self._answer, goal, self.others, self.compared)

    def _answer(self, system: Candidate) -> Floats:
        if system.name not in self._answers:
            self.bench.log(f"testing {system.name} on {len(self.test_rows):,} inputs of the choosing set")
            self._answers[system.name] = self.bench.correct(system, self.test_rows)
        return self._answers[system.name]


def compare(
    adapters: Sequence[TrainedAdapter],
    pretrained: Pretrained,
    choosing: TaskData,
    max_length: int,
    store: StoreConfig,
    measure: MeasureConfig,
    log: Callable[[str], None] = log_nothing,
) -> Comparison:
    """Find the front of all systems, and time its systems on this hardware.

    The search uses the selection set and a part of the choosing set, and leaves the larger part to the tests. For the arguments, see :func:`make_plan`.
    """
    bench = Bench(pretrained, pretrained.tokenize(choosing.test, max_length), store, measure, log)
    selecting = Bench(pretrained, pretrained.tokenize(choosing.selection, max_length), store, measure, log)
    search_rows, test_rows = divide(choosing.test, measure.search_share, measure.seed)
    siso = bench.siso
    search_siso = np.concatenate([siso[search_rows], selecting.siso])
    selection = selecting.scores(adapters)
    scores = [one.joined(other) for one, other in zip(bench.scores(adapters, search_rows), selection)]
    settings = (search_siso, measure.thresholds, measure.max_stages, len(test_rows))
    pool = [*scores, *first_stages(selection, scores)]
    found = search(pool, *settings)
    if later := later_stages(selection, scores, found.front):
        found = search([*pool, *later], *settings)
    log(f"compared {found.compared:,} systems on {len(search_siso):,} inputs; {len(found.front)} are on the front")
    sequence = safest_first(bench.timed(safest_first(found.front)))
    listed = {one.name for one in sequence}
    others = [one for one in found.alone if one.name not in listed]
    return Comparison(bench, search_siso, siso[test_rows], test_rows, sequence, others, found.compared)


def unrounded(store: StoreConfig) -> StoreConfig:
    """The same store in float32, so that verification uses the states that a server computes, not rounded ones."""
    return replace(store, dtype="float32")


def verify_served(choice: Choice, bench: Bench, folder: Path) -> list[Served]:
    """Verify every served system once on the test split; all intervals together have the goal's confidence.

    Args:
        choice: as returned by :func:`revmux.plan.choose.choose`.
        bench: the frozen task model with the test split.
        folder: where the folder ``adapters`` is written, with one adapter folder per stage.
    """
    if choice.chosen is None:
        return []
    goal = choice.goal
    each = replace(goal, confidence=1 - (1 - goal.confidence) / len(choice.widths))
    served = []
    for one in choice.widths:
        system = one.candidate
        if system.is_plain:
            served.append(Served(one, verify(bench.siso, None, each)))
            continue
        verification = verify(bench.siso, bench.correct(system), each)
        served.append(Served(one, verification, write_stages(system, folder / "adapters")))
    return served


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
