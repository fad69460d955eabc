"""RevMUX on real GLUE tasks with the real small encoder: tune, freeze, store, train, and report on dev over shuffles.

python -m benchmarks.glue --folder path/to/GLUE   (folders SST-2, MRPC and RTE with train.tsv and dev.tsv)
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.trained import Run, fill_store, over_seeds, siso_row, train_missing, tuned_task_model
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.methods import method_class
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import exit_head_config
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, KEPT = Path("benchmarks/results/glue.json"), Path("runs/glue")
TASKS = ("SST-2", "MRPC", "RTE")
SYSTEMS = (
    ("RevMUX", MethodConfig("revmux", 2, 3, {"own_state": "linear"})),
    ("RevMUX", MethodConfig("revmux", 4, 3, {"own_state": "linear"})),
    ("Exit head, layer 3", exit_head_config(3)),
    ("Exit head, layer 4", exit_head_config(4)),
)


@dataclass(frozen=True)
class Budget:
    """How much data and training is used.

    Attributes:
        limit: maximum number of training sentences per task.
        max_length: tokens to which an input is truncated.
        tuning_epochs: epochs of the task model, whose lower half stays frozen.
        epochs: epochs of the adapters; exit heads get three times as many.
        seeds: runs per system.
        shuffles: groupings of dev per run.
    """

    limit: int
    max_length: int = 64
    tuning_epochs: int = 3
    epochs: int = 2
    seeds: int = 3
    shuffles: int = 10


def measure_task(folder: Path, name: str, budget: Budget) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of one task and the identity of its data."""
    data = DataConfig(source=str(folder / name), limit=budget.limit)
    task = load_task(data)
    kept = KEPT / name
    tuning = OptimConfig(budget.tuning_epochs, 32, 2e-4)
    embedded = BackboneConfig(max_length=budget.max_length)
    model = tuned_task_model(embedded, data, task, tuning, 3, kept)
    backbone = BackboneConfig(str(model), max_length=budget.max_length)
    store, runs = StoreConfig(root=str(kept / "features")), []
    for seed in range(budget.seeds):
        for title, method in SYSTEMS:
            epochs = budget.epochs * (1 if method_class(method.name).multiplexes() else 3)
            optim = OptimConfig(epochs, 16, 1e-3, seed=seed)
            recipe = Recipe(backbone, data, method, optim, LossConfig(distillation_weight=1.0), store, budget.shuffles)
            runs.append(Run.named(title, recipe, task, kept / "runs"))
    if not all(run.is_done for run in runs):
        for split in (task.train, task.selection, task.test):
            fill_store(runs[0].recipe, split, [3, 4])
        train_missing(runs, task)
    rows = over_seeds(runs)
    family = load_pretrained(backbone).backbone.config.model_type
    place = {"family": family, "backbone": f"{embedded.model}, tuned to the task", "task": name}
    everything = load_task(replace(data, limit=None))
    identity = task.identity | {"available": len(everything.train) + len(everything.selection)}
    return [place | row for row in [siso_row(rows[0]["siso_accuracy"]), *rows]], identity


def main() -> None:
    """Measure what has not been measured yet, then write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder that contains SST-2, MRPC and RTE")
    parser.add_argument("--limit", type=int, default=6000, help="maximum number of training sentences per task")
    arguments = parser.parse_args()
    budget = Budget(arguments.limit)
    rows: list[dict[str, Any]] = []
    identities: dict[str, Any] = {}
    for name in TASKS:
        found, identities[name] = measure_task(arguments.folder, name, budget)
        rows += found
    meta = describe_run(f"python -m benchmarks.glue --folder GLUE --limit {budget.limit}", identities, {})
    meta["backbone"] = {"name": BackboneConfig().model, "tuned": "upper half, on each task"}
    write_json(RESULT, {"meta": meta | {"budget": asdict(budget)}, "rows": rows})


if __name__ == "__main__":
    main()
