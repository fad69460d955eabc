"""The trials of a sweep on disk: what is to be tried, and of each finished one a row, written whole."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ray_jobs.training.launch import fingerprint
from revmux.backbone import Backbone
from revmux.data.task import TaskData
from revmux.errors import UserError
from revmux.estimate.flops import relative_cost
from revmux.methods import BackboneShape, Siso, build_method
from revmux.plan.front import FrontRow, mark_front
from revmux.training.config import Recipe
from revmux.utils.files import write_durably, write_json
from revmux.utils.redact import without_passwords

COUNTED_LENGTH = 64
"""Tokens of the inputs at which points are compared before they run; relative costs hardly depend on it."""
ROWS, IDENTITY = "rows", "sweep-identity.json"
FAILED = "failed"
"""What a trial reports that has failed for good, and has written so in its row."""


@dataclass(frozen=True)
class Trial:
    """A point of the space that is to be tried.

    Attributes:
        name: readable, and unique to the recipe and the data.
        recipe: the run.
        cost: counted beforehand, relative to SISO.
    """

    name: str
    recipe: Recipe
    cost: float

    @property
    def knobs(self) -> dict[str, str | int | float]:
        """What the search varies."""
        method = self.recipe.method
        return {
            "method": method.name,
            "num_inputs": method.num_inputs,
            "prefill_layers": method.prefill_layers,
            "infonce_weight": self.recipe.loss.infonce_weight,
            "learning_rate": self.recipe.optim.learning_rate,
        }


@dataclass(frozen=True)
class TrialRow:
    """What became of a trial; the same fields for all.

    Attributes:
        trial: its name.
        method: registered name of the method.
        num_inputs: N.
        prefill_layers: l.
        infonce_weight: λ.
        learning_rate: peak rate.
        status: ``done``; ``stopped`` before its end, since others were better; ``failed``.
        why: of a trial that was stopped or failed.
        cost_counted: operations an input relative to SISO.
        metrics: the figures of the reported split, or as far as training came.
        seconds: from the start to the end of the trial.
        adapter: folder of the adapter; None unless done.
        run_id: of the MLflow run; None where none was begun.
    """

    trial: str
    method: str
    num_inputs: int
    prefill_layers: int
    infonce_weight: float
    learning_rate: float
    status: Literal["done", "stopped", "failed"]
    why: str
    cost_counted: float
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    adapter: str | None = None
    run_id: str | None = None

    @property
    def selection_accuracy(self) -> float | None:
        """Best accuracy on the slice of train that chooses; None where training did not come so far."""
        return self.metrics.get("selection_accuracy")


def row_of(trial: Trial, status: Literal["done", "stopped", "failed"], why: str = "", **figures: Any) -> TrialRow:
    """The row of a trial, with its knobs filled in."""
    knobs: dict[str, Any] = trial.knobs
    return TrialRow(trial=trial.name, status=status, why=why, **knobs, **{"cost_counted": trial.cost} | figures)


def make_trials(points: Sequence[Recipe], task: TaskData, backbone: Backbone) -> list[Trial]:
    """Points with their names and counted costs, cheapest first.

    Args:
        points: legal ones.
        task: the data.
        backbone: of any device; its shape counts.
    """
    shape = BackboneShape.of(backbone)
    made = []
    for point in points:
        method = point.method
        with torch.device("meta"):
            adapters = build_method(method.name, shape, method.num_inputs, method.options)
        length = min(COUNTED_LENGTH, point.backbone.max_length - adapters.added_tokens)
        cost = relative_cost(backbone, adapters, method.prefill_layers, length)
        name = f"{method.name}-n{method.num_inputs}-l{method.prefill_layers}-{fingerprint(point, task)[:6]}"
        made.append(Trial(name, point, cost))
    return sorted(made, key=lambda trial: (trial.cost, trial.name))


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: made where it is missing.
        identity: of data and backbone.

    Raises:
        UserError: the folder holds a sweep of other data or another backbone.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        file = path / IDENTITY
        if file.is_file():
            found = json.loads(file.read_text())
            for key, value in identity.items():
                if found.get(key) != value:
                    raise UserError(
                        f"sweep folder {str(path)!r} has {key} {found.get(key)!r}, this sweep has {value!r}; give this one "
                        "another --name"
                    )
        else:
            write_json(file, identity)

    def write(self, row: TrialRow) -> None:
        """Note what became of a trial."""
        write_json(self.path / ROWS / f"{row.trial}.json", asdict(row))

    def forget(self, row: TrialRow) -> None:
        """Take a row away, so that its trial is tried again."""
        (self.path / ROWS / f"{row.trial}.json").unlink(missing_ok=True)

    def read(self, trials: Sequence[Trial]) -> dict[str, TrialRow]:
        """The rows of those of the trials that came to an end, by name."""
        files = {trial.name: self.path / ROWS / f"{trial.name}.json" for trial in trials}
        return {name: TrialRow(**json.loads(file.read_text())) for name, file in files.items() if file.is_file()}

    def remove_checkpoints(self, trial: Trial) -> None:
        """Free what a trial that will not go on has left."""
        for folder in (self.path / "checkpoints").glob(f"{trial.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def parent(self) -> str | None:
        """The MLflow run of the sweep, if it was begun."""
        file = self.path / "parent-run.txt"
        return (file.read_text().strip() or None) if file.is_file() else None

    def set_parent(self, run_id: str) -> None:
        """Note the MLflow run of the sweep."""
        write_durably(self.path / "parent-run.txt", run_id + "\n")


def front_rows(rows: Sequence[TrialRow]) -> list[FrontRow]:
    """The finished trials and SISO as rows of a front, by accuracy on the reported split."""
    done = [row for row in rows if row.status == "done" and "accuracy_mean" in row.metrics]
    made = [
        FrontRow(
            name=row.trial,
            method=row.method,
            num_inputs=row.num_inputs,
            prefill_layers=row.prefill_layers,
            infonce_weight=row.infonce_weight,
            accuracy=row.metrics["accuracy_mean"],
            siso_accuracy=row.metrics.get("siso_accuracy", math.nan),
            cost_counted=row.cost_counted,
            accuracy_std=row.metrics.get("accuracy_std", 0.0),
        )
        for row in done
    ]
    known = [row.siso_accuracy for row in made if not math.isnan(row.siso_accuracy)]
    if known:
        made.insert(0, FrontRow(Siso.name, Siso.name, 1, 0, math.nan, known[0], known[0], 1.0))
    return mark_front(made)


def reason_of(error: str) -> str:
    """One line of a traceback that says why a trial failed."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"([\w.]+\.)?(UserError|\w*OutOfMemory\w*|FloatingPointError)\b", line)]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Died)\b", line)]
    return without_passwords((told or named or lines or ["unknown"])[-1].removeprefix("revmux.errors."))[:400]
