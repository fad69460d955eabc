"""Fill the feature store ahead of training. All workers together run the frozen task model over the data once.

revmux features --backbone.model runs/task-model --data.source reviews.csv --layers [2,3]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ray_jobs import cli
from ray_jobs.training.config import FeaturesJob
from revmux.data.peek import check_source
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras


def main(job: FeaturesJob) -> None:
    """Check the settings, read the data, and fill the stores."""
    check_extras("train")
    check_model(job.backbone)
    check_source(job.data)
    from ray_jobs.training.store_features import run_features

    run_features(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, FeaturesJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
