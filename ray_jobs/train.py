"""Train adapters on a frozen task model, one after another for each N.

revmux train --backbone.model runs/task-model --data.source reviews.csv --num_inputs [2,4]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_jobs import cli
from ray_jobs.training.config import TrainJob
from revmux.data.peek import check_source
from revmux.pretrained.location import check_model
from revmux.training.config import check_method_name
from revmux.utils.extras import check_extras

if TYPE_CHECKING:
    from ray_jobs.training.launch import Trained


def main(job: TrainJob) -> list[Trained]:
    """Check the settings, then train, evaluate and record one adapter per N."""
    check_extras("train", "mlflow")
    check_method_name(job.method.name)
    check_model(job.backbone)
    check_source(job.data)
    from ray_jobs.training.adapters import run_train

    return run_train(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, TrainJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
