"""python -m benchmarks.plan [--glue GLUE]"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan import allowances, sweep
from benchmarks.plan.tasks import Budget, Planned, plan_task
from benchmarks.rows import kept_rows, unmeasured_row
from ray_jobs.sweep.config import TuneJob
from revmux.data.config import DataConfig
from revmux.plan.config import MeasureConfig, SplitConfig
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, KEPT = Path("benchmarks/results/plan.json"), Path("runs/plan")
BUDGET = Budget()
MEASURE = MeasureConfig(shuffles=3, throughput_inputs=128, throughput_pairs=3)
EMBEDDED, SST2 = "docstrings", "SST-2"
SPLITS = SplitConfig(share=0.5, limit=8000)
SST2_LIMIT = 12000
SPACE, PER_CLASS, ROUNDS = "quick", 340, 2


def measure_allowances(name: str, data: DataConfig, kept: Path) -> tuple[Planned, dict[str, Any]]:
    """Return a task and the rows of its plans."""
    planned = plan_task(name, data, SPLITS, BUDGET, kept)
    asked = (planned.recipes, planned.choosing.identity["sha256"], MEASURE, allowances.ALLOWANCES)
    found = kept_rows(kept, f"allowances-{name}", asked, partial(allowances.measure, planned, MEASURE))
    return planned, found


def measure_sweep(planned: Planned, kept: Path) -> list[dict[str, Any]]:
    """Return rows for the time of a sweep, on a plan's task model and less data."""
    job = TuneJob(planned.recipes[0].backbone, DataConfig(EMBEDDED, per_class=PER_CLASS), SPACE)
    rounds = [
        kept_rows(
            kept, f"sweep-round-{number}", (job, planned.choosing.identity["sha256"]), partial(sweep.one_round, job)
        )
        for number in range(ROUNDS)
    ]
    about = {"task": planned.name, "sentences": PER_CLASS * len(planned.task.label_names)}
    return [about | row for row in sweep.rows_of(rounds, SPACE)]


def main() -> None:
    """Measure what has not been measured yet, then write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=allowances.__doc__)
    parser.add_argument(
        "--glue",
        type=Path,
        help="folder that contains SST-2 in GLUE's layout; without it, only the embedded task is measured",
    )
    glue: Path | None = parser.parse_args().glue
    if glue is not None and not (glue / SST2).is_dir():
        parser.error(f"{glue} has no folder {SST2}; name a folder that contains one")
    planned, embedded = measure_allowances(EMBEDDED, DataConfig(EMBEDDED), KEPT)
    found = {EMBEDDED: embedded}
    missing = []
    if glue is not None:
        _, found[SST2] = measure_allowances(SST2, DataConfig(source=str(glue / SST2), limit=SST2_LIMIT), KEPT)
    else:
        missing = [
            unmeasured_row(allowances.ratio_name(points, SST2), "no GLUE folder was named", 1.0)
            for points in allowances.ALLOWANCES
        ]
    rows = [row for one in found.values() for row in one["rows"]] + missing + measure_sweep(planned, KEPT)
    command = "python -m benchmarks.plan" + " --glue GLUE" * (glue is not None)
    meta = describe_run(
        command,
        {name: one["task"] for name, one in found.items()},
        {name: one["backbone"] for name, one in found.items()},
    )
    write_json(RESULT, {"meta": meta | {"budget": asdict(BUDGET), "measure": asdict(MEASURE)}, "rows": rows})


if __name__ == "__main__":
    main()
