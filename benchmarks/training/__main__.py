"""python -m benchmarks.training"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rows import unmeasured_row
from benchmarks.training import epochs, memory, sweep, workers
from benchmarks.training.backbones import small_task
from revmux.results import describe_run, write_json

RESULT = Path("benchmarks/results/training.json")


def main() -> None:
    """Measure all and write the file."""
    rows: list[dict[str, Any]] = [*epochs.measure(), *sweep.measure(), *workers.measure(), *memory.measure()]
    why = "no GPU was at hand to write this part against"
    rows += [
        unmeasured_row(f"examples a second and share of the peak matrix rate in bf16 on a GPU, SST-2: {name}", why)
        for name in ("all-MiniLM-L6-v2", "BERT-base shape")
    ]
    task = small_task()
    backbone = {"name": "all-MiniLM-L6-v2 with a fresh head; BERT-base shape with random weights"}
    write_json(RESULT, {"meta": describe_run("python -m benchmarks.training", task.identity, backbone), "rows": rows})


if __name__ == "__main__":
    main()
