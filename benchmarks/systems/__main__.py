"""python -m benchmarks.systems"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks.systems.accuracy import Budget, measure
from benchmarks.systems.families import measure_families, published_shapes
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT = Path("benchmarks/results/systems.json")
FOLDER = Path("runs/systems")
PAIRS = 3


def main() -> None:
    """Measure what has not been measured yet, then write the result file."""
    budget = Budget()
    trained, data, backbone = measure(budget, FOLDER, PAIRS)
    families = measure_families(FOLDER, PAIRS)
    place = {"family": "bert", "backbone": "all-MiniLM-L6-v2, tuned to the task", "task": data["source"], "fallback": 0}
    rows = [place | row for row in trained] + families + published_shapes()
    meta = describe_run("python -m benchmarks.systems", data, backbone)
    write_json(RESULT, {"meta": meta | {"budget": asdict(budget)}, "rows": rows})


if __name__ == "__main__":
    main()
