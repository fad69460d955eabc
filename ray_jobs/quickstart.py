"""A guided tour on this machine: tune a task model, train adapters, plan, serve, and report.

revmux quickstart
revmux quickstart --backbone.model MY_CLASSIFIER --data.source my.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ray_jobs import cli
from ray_jobs.tour.config import QuickstartJob
from revmux.data.peek import check_source
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras


def main(job: QuickstartJob) -> None:
    """Check the settings, then run every step and stop everything that was started."""
    check_extras("tune", "serve", "mlflow", "report", "plan", "tour")
    check_model(job.backbone, needs_answers=False)  # a model without a head is tuned first
    check_source(job.data)
    from ray_jobs.tour.run import run_tour

    run_tour(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, QuickstartJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
