"""Sweep N, l and λ over a search space. Each trial is a Ray Train run and a child of the sweep's MLflow run.

revmux tune --backbone.model runs/task-model --data.source reviews.csv --space quick
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_jobs import cli
from ray_jobs.sweep.config import TuneJob
from revmux.data.peek import check_source
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras
from tune_spaces.space import load_space

if TYPE_CHECKING:
    from ray_jobs.sweep.trials import TrialRow


def main(job: TuneJob) -> list[TrialRow]:
    """Check the settings, run the trials, and record the comparison."""
    check_extras("tune", "mlflow", "report")
    load_space(job.space)
    check_model(job.backbone)
    check_source(job.data)
    from ray_jobs.sweep.run import run_tune

    return run_tune(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, TuneJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
