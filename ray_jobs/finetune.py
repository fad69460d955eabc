"""Tune a backbone to a task. The result is the SISO model, which stays frozen from then on. A ready classifier needs no tuning.

revmux finetune --data.source reviews.csv --output runs/task-model
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_jobs import cli
from ray_jobs.training.config import FinetuneJob
from revmux.data.peek import check_source
from revmux.errors import UserError
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras

if TYPE_CHECKING:
    from ray_jobs.training.launch import Trained


def main(job: FinetuneJob) -> Trained:
    """Check, tune, evaluate, record."""
    check_extras("train", "mlflow")
    if job.backbone.dtype != "float32":
        raise UserError(
            f"dtype is {job.backbone.dtype}, but a task model is tuned in float32; leave --backbone.dtype out"
        )
    check_model(job.backbone, needs_answers=False)
    check_source(job.data)
    from ray_jobs.training.task_model import run_finetune

    return run_finetune(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; 0, or 2 after a mistake of the user's."""
    return cli.run(main, FinetuneJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
