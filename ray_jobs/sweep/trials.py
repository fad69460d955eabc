"""The trials of a sweep, and the sweep folder with one row per trial that ended."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ray_jobs.training.launch import RUN_ID_FILE, fingerprint
from revmux.backbone import Backbone
from revmux.data.task import TaskData
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.estimate.flops import relative_cost
from revmux.methods import BackboneShape, Siso, build_method
from revmux.plan.front import FrontRow, mark_front
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_tokenizer
from revmux.training.config import Recipe
from revmux.utils.files import write_durably, write_json
from revmux.utils.redact import without_passwords

_log = logging.getLogger(__name__)
ROWS, CURVES, IDENTITY = "rows", "curves", "sweep-identity.json"
EPOCH, ACCURACY = "epoch", "selection_accuracy"
"""Keys of what a trial reports after each epoch."""
FAILED = "failed"
"""Key that a trial reports after it has failed for good and has written its row."""


@dataclass(frozen=True)
class Trial:
    """A point of the space to try.

    Attributes:
        name: readable name, unique for the recipe and the data.
        recipe: settings of the run.
        cost: counted cost relative to SISO, known before the trial runs.
    """

    name: str
    recipe: Recipe
    cost: float

    @property
    def knobs(self) -> dict[str, str | int | float]:
        """The settings that the search varies."""
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
    """The outcome of a trial, with the same fields for all trials.

    Attributes:
        trial: name of the trial.
        method: registered name of the method.
        num_inputs: N.
        prefill_layers: l.
        infonce_weight: λ.
        learning_rate: peak rate.
        status: ``done``, ``stopped`` early because other trials were better, or ``failed``.
        why: reason why the trial was stopped or failed; empty if it is done.
        cost_counted: operations per input relative to SISO.
        metrics: figures on the reported split, or the last training metrics of a trial that is not done.
        seconds: from the start to the end of the trial.
        adapter: folder of the adapter; None unless done.
        run_id: id of the MLflow run; None if the trial started no run.
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
        """Best accuracy on the selection set; None if no epoch was evaluated."""
        return self.metrics.get("selection_accuracy")


def row_of(trial: Trial, status: Literal["done", "stopped", "failed"], why: str = "", **figures: Any) -> TrialRow:
    """The row of a trial, with the trial's settings filled in."""
    knobs: dict[str, Any] = trial.knobs
    return TrialRow(trial=trial.name, status=status, why=why, **knobs, **{"cost_counted": trial.cost} | figures)


def make_trials(points: Sequence[Recipe], task: TaskData, backbone: Backbone, length: int) -> list[Trial]:
    """Name the points and count their costs; returns the trials, cheapest first.

    Args:
        points: legal points.
        task: the task's data.
        backbone: on any device; only its shape is used.
        length: tokens per input at which costs are counted, see :func:`mean_length`.
    """
    shape = BackboneShape.of(backbone)
    made = []
    for point in points:
        method = point.method
        with torch.device("meta"):
            adapters = build_method(method.name, shape, method.num_inputs, method.options)
        cost = relative_cost(backbone, adapters, method.prefill_layers, length)
        name = f"{method.name}-n{method.num_inputs}-l{method.prefill_layers}-{fingerprint(point, task)[:6]}"
        made.append(Trial(name, point, cost))
    return sorted(made, key=lambda trial: (trial.cost, trial.name))


def mean_length(config: BackboneConfig, task: TaskData) -> int:
    """The mean number of tokens per input of the selection set, since relative costs depend on it."""
    tokenizer, prompt = load_tokenizer(config, task.label_names)
    lengths = TokenizedSplit(task.selection, tokenizer, config.max_length, prompt).lengths
    return max(1, round(float(lengths.double().mean())))


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: created if missing.
        identity: identity of the data and the backbone.

    Raises:
        UserError: the folder contains a sweep on other data or another backbone.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        file = path / IDENTITY
        if file.is_file():
            found = json.loads(file.read_text())
            for key, value in identity.items():
                if found.get(key) != value:
                    raise UserError(
                        f"sweep folder {str(path)!r} belongs to a sweep with {key} {found.get(key)!r}, but this sweep has "
                        f"{value!r}; choose another --name"
                    )
        else:
            write_json(file, identity)

    def write(self, row: TrialRow) -> None:
        """Write the row of a trial."""
        write_json(self.path / ROWS / f"{row.trial}.json", asdict(row))

    def forget(self, row: TrialRow) -> None:
        """Delete a row, so that its trial is tried again."""
        (self.path / ROWS / f"{row.trial}.json").unlink(missing_ok=True)

    def read(self, trials: Sequence[Trial]) -> dict[str, TrialRow]:
        """The rows of the given trials that have ended, by name. A trial whose row is damaged is tried again."""
        found: dict[str, TrialRow] = {}
        for trial in trials:
            file = self.path / ROWS / f"{trial.name}.json"
            if not file.is_file():
                continue
            try:
                found[trial.name] = TrialRow(**json.loads(file.read_bytes()))
            except (ValueError, TypeError) as error:
                _log.warning("%s is damaged (%s); its trial is tried again", file, error)
        return found

    def write_curve(self, trial: Trial, curve: Mapping[int, float]) -> None:
        """Write a trial's selection accuracy per epoch, with which later trials are compared after a restart."""
        write_json(self.path / CURVES / f"{trial.name}.json", {str(epoch): curve[epoch] for epoch in sorted(curve)})

    def curves(self, trials: Sequence[Trial]) -> dict[str, dict[int, float]]:
        """The curves of the given trials, by name. A damaged one is omitted."""
        found: dict[str, dict[int, float]] = {}
        for trial in trials:
            file = self.path / CURVES / f"{trial.name}.json"
            if file.is_file():
                try:
                    content = json.loads(file.read_bytes())
                    found[trial.name] = {int(epoch): float(accuracy) for epoch, accuracy in content.items()}
                except (ValueError, TypeError, AttributeError) as error:
                    _log.warning("%s is damaged (%s); early stopping does without it", file, error)
        return found

    def run_id(self, trial: Trial) -> str | None:
        """The MLflow run of a trial that has not finished; None if it has not started one."""
        for file in (self.path / "checkpoints").glob(f"{trial.name}-*/{RUN_ID_FILE}"):
            return file.read_text().strip() or None
        return None

    def remove_checkpoints(self, trial: Trial) -> None:
        """Delete the checkpoints of a trial that will not continue."""
        for folder in (self.path / "checkpoints").glob(f"{trial.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def parent(self) -> str | None:
        """The MLflow run id of the sweep; None before its first start."""
        file = self.path / "parent-run.txt"
        return (file.read_text().strip() or None) if file.is_file() else None

    def set_parent(self, run_id: str) -> None:
        """Write the MLflow run id of the sweep."""
        write_durably(self.path / "parent-run.txt", run_id + "\n")


def front_rows(rows: Sequence[TrialRow]) -> list[FrontRow]:
    """The finished trials and SISO as rows of a front.

    Accuracies are those on the selection set, so that the test split, which is only reported, does not choose.
    """
    done = [row for row in rows if row.status == "done" and row.selection_accuracy is not None]
    made = [
        FrontRow(
            name=row.trial,
            method=row.method,
            num_inputs=row.num_inputs,
            prefill_layers=row.prefill_layers,
            infonce_weight=row.infonce_weight,
            accuracy=row.metrics["selection_accuracy"],
            siso_accuracy=row.metrics.get("selection_siso_accuracy", math.nan),
            cost_counted=row.cost_counted,
            test_accuracy=row.metrics.get("accuracy_mean", math.nan),
        )
        for row in done
    ]
    known = [
        (row.siso_accuracy, trial.metrics.get("siso_accuracy", math.nan))
        for row, trial in zip(made, done)
        if not math.isnan(row.siso_accuracy)
    ]
    if known:
        selected, tested = known[0]
        siso = FrontRow(Siso.name, Siso.name, 1, 0, math.nan, selected, selected, 1.0, test_accuracy=tested)
        made.insert(0, siso)
    return mark_front(made)


def reason_of(error: str) -> str:
    """The line of a traceback that states why a trial failed."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    clear = [line for line in lines if re.match(r"([\w.]+\.)?(UserError|\w*OutOfMemory\w*|FloatingPointError)\b", line)]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Died)\b", line)]
    return without_passwords((clear or named or lines or ["unknown"])[-1].removeprefix("revmux.errors."))[:400]
