"""Find the cheapest system within an allowed loss of accuracy, and write the configuration that serves it.

revmux plan --goal.allowance 1.0
revmux plan --goal.allowance 1.0 --backbone.model MY_CLASSIFIER --data.source my.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_jobs import cli
from ray_jobs.planning.config import PlanJob
from revmux.data.peek import check_source
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras
from tune_spaces.space import load_space

if TYPE_CHECKING:
    from revmux.plan.plan import Plan


def main(job: PlanJob) -> Plan:
    """Check the settings, run the sweep, choose and verify a system, register it, and write the server's configuration.

    Raises:
        UserError: the goal cannot be met, or the loss on the test split exceeds the allowance. The results are already
            written then.
    """
    check_extras("tune", "mlflow", "report", "plan")
    load_space(job.space)
    check_model(job.backbone, needs_answers=False)  # a model without a head is tuned first
    check_source(job.data)
    from ray_jobs.planning.run import run_plan

    return run_plan(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, PlanJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
