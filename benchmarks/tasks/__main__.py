"""python -m benchmarks.tasks"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import ArgumentParser

from benchmarks.rows import kept_rows
from benchmarks.tasks.measure import measure_cold, measure_memory, measure_mixed, measure_together, measure_unmerged
from benchmarks.tasks.replica import Replica, replica
from benchmarks.tasks.settings import Row, Settings
from revmux.errors import UserError
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.identity import identity_of
from revmux.utils.environment import replica_environment
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT = Path("benchmarks/results/tasks.json")
KEPT = Path("runs/tasks")


def measure_all(settings: Settings, folder: Path, keep: Path) -> list[Row]:
    """Return all rows, kept ones and newly measured ones.

    Args:
        settings: settings of the benchmark.
        folder: temporary folder for the adapters.
        keep: folder in which the rows of each stage are kept.
    """
    with ExitStack() as opened:

        @cache
        def started() -> Replica:  # only if a stage has to be measured
            return opened.enter_context(replica(settings, folder))

        stages: dict[str, Callable[[Replica], list[Row]]] = {
            "memory": measure_memory,
            "cold": measure_cold,
            "mixed": measure_mixed,
            "together": measure_together,
            "unmerged": partial(measure_unmerged, str(folder / "0")),
        }
        rows: list[Row] = []
        for name, measure in stages.items():
            rows += kept_rows(keep, name, settings.about(), partial(_measured, measure, started))
        return rows


def _measured(measure: Callable[[Replica], list[Row]], started: Callable[[], Replica]) -> list[Row]:
    return measure(started())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has not been measured yet, then write the result file; return 2 for invalid arguments."""
    parser = ArgumentParser(
        prog="python -m benchmarks.tasks", description="Measure many tasks on one base in one replica."
    )
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--result", type=Path, default=RESULT, help="result file to write")
    parser.add_argument(
        "--keep", type=Path, default=KEPT, help="folder in which the rows of each measured stage are kept"
    )
    parsed = parser.parse_args(argv)
    try:
        chosen = parser.instantiate(parsed).as_dict()
        result, keep = chosen.pop("result"), chosen.pop("keep")
        settings = Settings(**chosen)
        torch.set_num_threads(settings.threads)
        with TemporaryDirectory(prefix="revmux-tasks-") as folder:
            rows = measure_all(settings, Path(folder), keep)
        backbone = identity_of(BackboneConfig(settings.base))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = {"texts": "random words", "tokens": settings.tokens}
    meta = describe_run("python -m benchmarks.tasks", data, backbone) | {"settings": settings.about()}
    write_json(result, {"meta": meta, "rows": rows})
    return 0


if __name__ == "__main__":
    environment = replica_environment()
    if environment.items() <= os.environ.items():
        sys.exit(main())
    # The process gets the memory settings of a replica, which it reads when it starts.
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.tasks", *sys.argv[1:]], {**os.environ, **environment})
