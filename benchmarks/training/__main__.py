"""python -m benchmarks.training"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rows import kept_rows, unmeasured_row
from benchmarks.training import epochs, memory, sweep, workers
from benchmarks.training.backbones import small_task
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, KEPT = Path("benchmarks/results/training.json"), Path("runs/training")


def main() -> None:
    """Measure everything, then write the result file."""
    stages = {"epochs": epochs, "sweep": sweep, "workers": workers, "memory": memory}
    rows: list[dict[str, Any]] = []
    for name, stage in stages.items():
        rows += kept_rows(KEPT, name, stage.SETTINGS, stage.measure)
    why = "no GPU was available when this part was written"
    rows += [
        unmeasured_row(f"examples per second and share of the peak matrix rate in bf16 on a GPU, SST-2: {name}", why)
        for name in ("all-MiniLM-L6-v2", "BERT-base shape")
    ]
    task = small_task()
    backbone = {"name": "all-MiniLM-L6-v2 with a fresh head; BERT-base shape with random weights"}
    write_json(RESULT, {"meta": describe_run("python -m benchmarks.training", task.identity, backbone), "rows": rows})


if __name__ == "__main__":
    main()
