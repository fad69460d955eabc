"""The trials of a sweep, and the sweep folder with one row per trial that ended."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ray_jobs.paths import own_folder
from ray_jobs.training.launch import fingerprint, read_run_id
from revmux.backbone import Backbone
from revmux.data.task import TaskData
from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.estimate.flops import relative_cost
from revmux.methods import BackboneShape, Siso, build_method
from revmux.plan.front import FrontRow, mark_front
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_tokenizer
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import Recipe
from revmux.utils.copies import join_location
from revmux.utils.place import Place
from revmux.utils.redact import without_passwords

_log = logging.getLogger(__name__)
ROWS, CURVES, IDENTITY, PARENT = "rows", "curves", "sweep-identity.json", "parent-run.txt"
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
        points: valid points.
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
        location: folder or URI, created if missing.
        identity: identity of the data and the backbone.

    Attributes:
        place: the folder.
        path: the folder of this machine's own files of the sweep; the folder itself, unless it is a URI.

    Raises:
        UserError: the folder contains a sweep on other data or another backbone.
    """

    def __init__(self, location: str | Path, identity: dict[str, Any]) -> None:
        self.location, self.path = str(location), own_folder(location)
        self.place = Place.open(self.location)
        self.place.create()
        if IDENTITY in self.place.files():
            found = json.loads(self.place.get(IDENTITY))
            for key, value in identity.items():
                if found.get(key) != value:
                    raise UserError(
                        f"sweep folder {self.location!r} belongs to a sweep with {key} {found.get(key)!r}, but this sweep has "
                        f"{value!r}; choose another --name"
                    )
        else:
            self.place.put(IDENTITY, _json(identity))

    def write(self, row: TrialRow) -> None:
        """Write the row of a trial."""
        rows = self._rows()
        rows.create()
        rows.put(f"{row.trial}.json", _json(asdict(row)))

    def forget(self, row: TrialRow) -> None:
        """Delete a row, so that its trial is retried."""
        with suppress(FileNotFoundError):
            self._rows().remove_file(f"{row.trial}.json")

    def read(self, trials: Sequence[Trial]) -> dict[str, TrialRow]:
        """The rows of the given trials that have ended, by name. A trial whose row is damaged is tried again."""
        rows = self._rows()
        present = set(rows.files())
        found: dict[str, TrialRow] = {}
        for trial in trials:
            name = f"{trial.name}.json"
            if name not in present:
                continue
            try:
                found[trial.name] = TrialRow(**json.loads(rows.get(name)))
            except (ValueError, TypeError) as error:
                _log.warning("%s is damaged (%s); its trial is retried", rows.file(name), error)
        return found

    def write_curve(self, trial: Trial, curve: Mapping[int, float]) -> None:
        """Write a trial's selection accuracy per epoch, with which later trials are compared after a restart."""
        curves = self.place.child(CURVES)
        curves.create()
        curves.put(f"{trial.name}.json", _json({str(epoch): curve[epoch] for epoch in sorted(curve)}))

    def curves(self, trials: Sequence[Trial]) -> dict[str, dict[int, float]]:
        """The curves of the given trials, by name. A damaged one is omitted."""
        curves = self.place.child(CURVES)
        present = set(curves.files())
        found: dict[str, dict[int, float]] = {}
        for trial in trials:
            name = f"{trial.name}.json"
            if name in present:
                try:
                    content = json.loads(curves.get(name))
                    found[trial.name] = {int(epoch): float(accuracy) for epoch, accuracy in content.items()}
                except (ValueError, TypeError, AttributeError) as error:
                    _log.warning("%s is damaged (%s); early stopping ignores it", curves.file(name), error)
        return found

    def run_id(self, trial: Trial) -> str | None:
        """The MLflow run of a trial that has not finished; None if it has not started one."""
        for folder in self._checkpoints(trial):
            if run_id := read_run_id(folder):
                return run_id
        return None

    def _checkpoints(self, trial: Trial) -> list[Place]:
        checkpoints = self.place.child("checkpoints")
        return [checkpoints.child(name) for name in checkpoints.folders() if name.startswith(f"{trial.name}-")]

    def _rows(self) -> Place:
        return self.place.child(ROWS)

    def remove_checkpoints(self, trial: Trial) -> None:
        """Delete the checkpoints of a trial that will not continue."""
        for folder in self._checkpoints(trial):
            name = folder.path.rpartition("/")[2]
            CheckpointFolder(join_location(self.location, f"checkpoints/{name}")).remove()

    def parent(self) -> str | None:
        """The MLflow run id of the sweep; None before its first start."""
        try:
            return self.place.get(PARENT).decode().strip() or None
        except FileNotFoundError:
            return None

    def set_parent(self, run_id: str) -> None:
        """Write the MLflow run id of the sweep."""
        self.place.put(PARENT, f"{run_id}\n".encode())

    def keep_own_files(self) -> None:
        """Copy the files in :attr:`path` to the folder if it is a URI."""
        if self.place.local:
            return
        for file in self.path.iterdir():
            if file.is_file():
                self.place.put(file.name, file.read_bytes())


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


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
