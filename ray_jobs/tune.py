"""Sweep N, l and λ: each trial a Ray Train run, all of them children of one MLflow run.

python -m ray_jobs.tune --backbone.model runs/task-model --space quick
"""

from __future__ import annotations

import sys

from ray_jobs import cli
from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_storage
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.run import prepare_sweep, run_sweep
from ray_jobs.sweep.trials import TrialRow
from ray_jobs.tracking.tracker import Tracker


def main(job: TuneJob) -> list[TrialRow]:
    """Check every point, run the trials, record the comparison."""
    storage = absolute_storage(job.storage)
    sweep = prepare_sweep(job, storage)
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        rows, _ = run_sweep(sweep, tracker)
    done = sum(row.status == "done" for row in rows)
    print(f"sweep: {done} of {len(rows)} trials done: {sweep.folder.path / 'sweep.json'}")
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(main, TuneJob, __doc__))
