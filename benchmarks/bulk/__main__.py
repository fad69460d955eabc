"""python -m benchmarks.bulk [--infinity ENVIRONMENT/bin/python]"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser

from benchmarks.bulk import measure
from benchmarks.bulk.settings import Row, Settings
from benchmarks.bulk.workloads import workloads
from benchmarks.rows import digest, kept_rows, unmeasured_row
from benchmarks.serving.settings import Shape
from benchmarks.serving.workloads import write_shape
from revmux.errors import UserError
from revmux.utils.environment import compute_environment
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT = Path("benchmarks/results/bulk.json")
KEPT = Path("runs/bulk")
TINY = Shape(32, 2, 2, 64)


def measure_all(
    settings: Settings, folder: Path, keep: Path, measured_only: bool = False
) -> tuple[list[Row], dict[str, Any]]:
    """Return all rows, kept ones and newly measured ones, and the identity of the texts.

    Args:
        settings: settings of the benchmark.
        folder: temporary folder for models and outputs.
        keep: folder in which the rows of each stage are kept.
        measured_only: whether to name the stages that are not measured yet instead of measuring them.
    """
    rows: list[Row] = []
    texts: dict[str, Any] = {}

    def stage(name: str, about: Any, title: str, measure_rows: Callable[[], list[Row]]) -> None:
        if measured_only and not (keep / f"{name}-{digest(about)}.json").is_file():
            rows.append(unmeasured_row(title, "this part of the benchmark has not run yet"))
        else:
            rows.extend(kept_rows(keep, name, about, measure_rows))

    for make in workloads(settings, folder):
        workload = make()
        texts[workload.name] = workload.about()
        about = settings.about("shape", "scale", "threads", "pairs") | texts[workload.name]
        infinity = about | {"infinity": bool(settings.infinity)}
        rivals = partial(measure.measure_rivals, workload, settings)
        stage(f"{workload.key}-function", infinity, f"{workload.name}: the function", rivals)
        groups = partial(measure.measure_groups, workload, settings)
        rounds = about | settings.about("group_pairs", "group_scale")
        stage(f"{workload.key}-groups", rounds, f"{workload.name}: groups", groups)
        job = partial(measure.measure_ray, workload, settings)
        stage(f"{workload.key}-ray", about, f"{workload.name}: the job on Ray", job)
    tiny = write_shape(folder / "tiny", TINY)
    memory = partial(measure.measure_memory, tiny, settings)
    stage("memory", settings.memory_rows, "peak memory of the function", memory)
    large = partial(measure.measure_large, tiny, settings)
    stage("large", settings.about("memory_rows", "large_pairs", "threads"), "a large file: the job on Ray", large)
    return rows, texts


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has not been measured yet, then write the result file; return 2 for invalid arguments."""
    parser = ArgumentParser(
        prog="python -m benchmarks.bulk",
        description="Measure bulk classification against other programs, and groups against their counted cost.",
    )
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--result", type=Path, default=RESULT, help="result file to write")
    parser.add_argument(
        "--keep", type=Path, default=KEPT, help="folder in which the rows of each measured stage are kept"
    )
    parser.add_argument("--measured-only", action="store_true", help="write what is measured so far")
    parsed = parser.parse_args(argv)
    try:
        chosen = parser.instantiate(parsed).as_dict()
        result, keep, measured_only = (chosen.pop(name) for name in ("result", "keep", "measured_only"))
        settings = Settings(**chosen)
        torch.set_num_threads(settings.threads)
        with TemporaryDirectory(prefix="revmux-bulk-") as folder:
            rows, texts = measure_all(settings, Path(folder), keep, measured_only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = "python -m benchmarks.bulk" + " --infinity ENVIRONMENT/bin/python" * bool(settings.infinity)
    backbone = {"names": list(texts), "weights": "random; those of the embedded encoder with a fresh head"}
    write_json(result, {"meta": describe_run(command, texts, backbone) | {"settings": settings.about()}, "rows": rows})
    return 0


if __name__ == "__main__":
    environment = compute_environment()
    if environment.items() <= os.environ.items():
        sys.exit(main())
    # All programs get the same memory settings, which a process reads when it starts.
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.bulk", *sys.argv[1:]], {**os.environ, **environment})
