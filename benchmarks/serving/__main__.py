"""python -m benchmarks.serving [--glue GLUE] [--infinity ENVIRONMENT/bin/infinity_emb]"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import ArgumentParser

from benchmarks.rows import kept_rows
from benchmarks.serving import alone, latency, saturated
from benchmarks.serving.servers import Servers
from benchmarks.serving.settings import CUTS, WIDTHS, Row, Settings
from benchmarks.serving.workloads import Workload, embedded_workload, shape_workload
from revmux.errors import UserError
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT = Path("benchmarks/results/serving.json")
KEPT = Path("runs/serving")


def measure(settings: Settings, folder: Path, keep: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return all rows, kept ones and newly measured ones, and the identity of the texts.

    Args:
        settings: settings of the benchmark.
        folder: temporary folder for models.
        keep: folder in which the rows of each stage are kept.
    """
    rows: list[Row] = []
    texts: dict[str, Any] = {}
    for make in (shape_workload, embedded_workload):
        workload = make(settings, folder)
        texts[workload.name] = {"texts": len(workload.texts), "tokens": workload.mean_length, "sha256": workload.digest}
        rows += measure_workload(workload, settings, keep)
    return rows + alone.measure_gpu(settings.pairs), texts


def measure_workload(workload: Workload, settings: Settings, keep: Path) -> list[Row]:
    """Return all rows of one backbone."""
    about, pairs = settings.about() | {"texts": workload.digest, "sizes": asdict(workload.sizes)}, settings.pairs
    rows: list[Row] = []

    def stage(name: str, measure_rows: Callable[[], list[Row]], **more: Any) -> list[Row]:
        found: list[Row] = kept_rows(keep, f"{workload.key}-{name}", about | more, measure_rows)
        rows.extend(found)
        return found

    stage("alone", partial(alone.measure, workload, pairs))
    with Servers(workload, settings) as servers:
        # On a small model, the client in Python is the limit; benchmarks.serving.path uses wrk.
        if workload.key == "shape":
            for cut in CUTS:
                for num_inputs in WIDTHS:
                    grouped = partial(saturated.measure_groups, servers, num_inputs, cut, pairs)
                    stage(f"saturated-n{num_inputs}-l{cut}", grouped)
            infinity = partial(saturated.measure_rival, servers, "infinity", pairs)
            stage("infinity", infinity, infinity=str(settings.infinity))
        [plain] = stage("plain", partial(saturated.measure_rival, servers, "plain", pairs))
        stage("quiet", partial(latency.measure_quiet, servers, pairs))
        stage("half", partial(latency.measure_half_load, servers, plain["plain_per_second"], pairs))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has not been measured yet, then write the result file; return 2 for invalid arguments."""
    parser = ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Measure the throughput and latency of the server against the plain model and other servers.",
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
        with TemporaryDirectory(prefix="revmux-serving-") as folder:
            rows, texts = measure(settings, Path(folder), keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = "python -m benchmarks.serving" + " --glue GLUE" * bool(settings.glue)
    command += " --infinity INFINITY/bin/infinity_emb" * bool(settings.infinity)
    backbone = {"names": list(texts), "weights": "random; those of the embedded encoder with a fresh head"}
    meta = describe_run(command, texts, backbone) | {"settings": settings.about()}
    write_json(result, {"meta": meta, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
