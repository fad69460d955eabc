"""Rounds of legs that alternate within one run. Every figure is a ratio of two legs of the same round."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from mlflow import MlflowClient

from benchmarks.bulk.peak import write_rows
from benchmarks.bulk.rivals import Pipeline, infinity, ray_data
from benchmarks.bulk.settings import Row, Settings
from benchmarks.bulk.workloads import Workload
from benchmarks.rows import ratio_row, unmeasured_row
from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.bulk.run import RUN_NAME, run_classify
from ray_jobs.cluster import ClusterConfig
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.bulk.output import META
from revmux.bulk.units import list_work
from revmux.utils.environment import compute_environment

RIVAL_TARGET, COUNTED_TARGET, RAY_TARGET, MEMORY_TARGET = 1.0, 0.97, 0.95, 1.1
MEMORY_UNIT = 2048
"""Rows per unit of the memory figure: the small file too has more units than a worker holds at once."""


def function_leg(config: BulkConfig) -> dict[str, float]:
    """Return the job's own figures at the end of a run of the library function; its clock starts with a loaded model."""
    figures: dict[str, float] = {}
    classify_files(config, on_progress=lambda progress: figures.update(progress.metrics(1)))
    shutil.rmtree(config.output)
    return figures


def measure_rivals(workload: Workload, settings: Settings) -> list[Row]:
    """Return the rows of the library function at N = 1 against other programs."""
    output = workload.folder.with_name(f"{workload.key}-out")
    pipeline = Pipeline(workload)
    plain: list[float] = []
    rivals: dict[str, list[float]] = {"transformers.pipeline": [], "infinity-emb's engine": []}
    failed = "no environment with infinity-emb was named: --infinity ENVIRONMENT/bin/python"
    for _ in range(settings.pairs):
        plain.append(function_leg(workload.config(output))["rows_per_second"])
        rivals["transformers.pipeline"].append(pipeline.rows_per_second(output.with_suffix(".parquet")))
        if settings.infinity is not None:
            try:
                rivals["infinity-emb's engine"].append(infinity(workload, settings))
            except subprocess.CalledProcessError as error:
                failed = f"it ended with status {error.returncode}"
    return [_rival_row(workload, "the function", name, plain, theirs, failed) for name, theirs in rivals.items()]


def measure_groups(workload: Workload, settings: Settings) -> list[Row]:
    """Return the rows of the library function in groups against N = 1; legs of a round follow each other at once."""
    output = workload.folder.with_name(f"{workload.key}-out")
    systems = workload.systems()
    workload = replace(workload, key=f"{workload.key}-groups", rows=round(workload.rows * settings.group_scale))
    plain: list[float] = []
    grouped: dict[str, list[dict[str, float]]] = {title: [] for title in systems}
    for _ in range(settings.group_pairs):
        plain.append(function_leg(workload.config(output))["rows_per_second"])
        for title, system in systems.items():
            grouped[title].append(function_leg(workload.config(output, **system)))
    return [_grouped_row(workload, title, plain, legs) for title, legs in grouped.items()]


def _rival_row(
    workload: Workload, ours: str, rival: str, plain: Sequence[float], theirs: Sequence[float], failed: str
) -> Row:
    name = f"{workload.name}: {ours} at N = 1 / {rival}"
    if not theirs:
        return unmeasured_row(name, failed, RIVAL_TARGET)
    row = ratio_row(name, [one / other for one, other in zip(plain, theirs)], RIVAL_TARGET)
    return row | {
        "plain_per_second": round(statistics.median(plain), 3),
        "rival_per_second": round(statistics.median(theirs), 3),
    }


def _grouped_row(workload: Workload, title: str, plain: Sequence[float], legs: Sequence[dict[str, float]]) -> Row:
    cost = legs[0]["cost"]
    ratios = [leg["rows_per_second"] / alone for alone, leg in zip(plain, legs)]
    name = f"{workload.name}, {title}: measured / counted speed-up"
    return ratio_row(name, [ratio * cost for ratio in ratios], COUNTED_TARGET) | {
        "cost_counted": round(cost, 4),
        "throughput_ratio": round(statistics.median(ratios), 3),
        "rows": workload.rows,
        "grouped_per_second": round(statistics.median(leg["rows_per_second"] for leg in legs), 3),
        "device_busy": round(statistics.median(leg["device_busy"] for leg in legs), 3),
    }


def measure_ray(workload: Workload, settings: Settings) -> list[Row]:
    """Return the rows of the job on a local cluster: against Ray Data, and against the library function."""
    output = workload.folder.with_name(f"{workload.key}-ray")
    function, job, data = [], [], []
    with local_cluster(settings):
        for _ in range(settings.pairs):
            function.append(function_leg(workload.config(output))["rows_per_second"])
            job.append(job_leg(workload.config(output), settings))
            data.append(ray_data(workload, settings, output))
            shutil.rmtree(output)
    overhead = ratio_row(
        f"{workload.name}: the job on Ray at N = 1 / the function",
        [one / other for one, other in zip(job, function)],
        RAY_TARGET,
    )
    return [_rival_row(workload, "the job on Ray", "Ray Data with the plain model", job, data, ""), overhead]


@contextmanager
def local_cluster(settings: Settings) -> Iterator[None]:
    """Start a cluster whose actor has all threads, and which has room for the tasks that read and write."""
    ray.init(
        address="local",
        num_cpus=2 * settings.threads,
        runtime_env={"env_vars": compute_environment()},
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


def job_leg(config: BulkConfig, settings: Settings) -> float:
    """Return the rows per second that the job reports to MLflow at its end."""
    output = Path(config.output)
    storage = output.with_name("runs")
    job = ClassifyJob(
        **vars(config),
        storage=str(storage),
        cluster=ClusterConfig(address="local", workers=1, cpus_per_worker=settings.threads),
    )
    run_classify(job, list_work(job))
    run_id = json.loads((output / META / RUN_NAME).read_text())["run_id"]
    found = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(run_id).data.metrics["rows_per_second"]
    shutil.rmtree(output)
    return float(found)


def measure_large(model: Path, settings: Settings) -> list[Row]:
    """Return a row with the speed of the job on a large file, divided by that of the function."""
    rows = settings.memory_rows[1]
    with TemporaryDirectory(prefix="revmux-large-") as folder, local_cluster(settings):
        file = Path(folder) / "rows.parquet"
        write_rows(file, rows)
        config = BulkConfig(input=str(file), output=str(Path(folder) / "out"), model=str(model))
        pairs = [
            (job_leg(config, settings), function_leg(config)["rows_per_second"]) for _ in range(settings.large_pairs)
        ]
    name = f"{rows:,} rows, a tiny model: the job on Ray at N = 1 / the function"
    figures = {"job_per_second": [job for job, _ in pairs], "function_per_second": [alone for _, alone in pairs]}
    return [ratio_row(name, [job / alone for job, alone in pairs], RAY_TARGET) | figures]


def measure_memory(model: Path, settings: Settings) -> list[Row]:
    """Return a row with the peak memory of the function on a large file, divided by that on a small one."""
    with TemporaryDirectory(prefix="revmux-memory-") as folder:
        peaks = [_peak(model, rows, Path(folder)) for rows in settings.memory_rows]
    small, large = settings.memory_rows
    row = ratio_row(
        f"peak memory of the function, {large:,} rows / {small:,} rows, a tiny model",
        [peaks[1]["megabytes"] / peaks[0]["megabytes"]],
        MEMORY_TARGET,
    )
    return [row | {"bound": "at most", "peaks": peaks}]


def _peak(model: Path, rows: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bulk.peak", str(model), str(rows), str(folder), str(MEMORY_UNIT)]
    found = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result
