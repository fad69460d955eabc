"""python -m benchmarks.systems"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.systems.accuracy import Budget, measure
from benchmarks.systems.families import measure_families, published_shapes
from revmux.results import describe_run, write_json

RESULT = Path("benchmarks/results/systems.json")
FOLDER = Path("runs/systems")


def with_throughput(trained: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trained systems with the ratios that the same shape with random weights has: speed does not read weights."""
    ratios = {(row["title"], row["num_inputs"]): row for row in measured if row["family"] == "bert"}
    columns = ("throughput_ratio", "ratio_min", "ratio_max", "pairs")
    filled = []
    for row in trained:
        same = ratios.get((row["title"], row["num_inputs"]))
        filled.append(row | ({name: same[name] for name in columns} if same else {}))
    return filled


def main() -> None:
    """Measure what has not been measured yet, then write the file."""
    budget = Budget()
    families = measure_families(FOLDER)
    trained, data, backbone = measure(budget, FOLDER)
    place = {"family": "bert", "backbone": "all-MiniLM-L6-v2, tuned to the task", "task": data["source"], "fallback": 0}
    rows = [place | row for row in with_throughput(trained, families)] + families + published_shapes()
    meta = describe_run("python -m benchmarks.systems", data, backbone)
    write_json(RESULT, {"meta": meta | {"budget": asdict(budget)}, "rows": rows})


if __name__ == "__main__":
    main()
