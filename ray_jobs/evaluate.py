"""Evaluate an adapter on the test split of a task, averaged over random groupings, and record the metrics.

revmux evaluate --backbone.model runs/task-model --data.source reviews.csv --adapter runs/adapters/revmux-n2-l2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ray_jobs import cli
from ray_jobs.training.config import EvaluateJob
from revmux.adapters.config import load_adapter_config
from revmux.data.peek import check_source
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras


def main(job: EvaluateJob) -> dict[str, float]:
    """Check the settings, evaluate the adapter on a worker, and record its metrics."""
    check_extras("train", "mlflow")
    load_adapter_config(job.adapter)
    check_model(job.backbone, needs_answers=False)  # the adapter may record the prompt that the model needs
    check_source(job.data)
    from ray_jobs.training.evaluate_adapter import run_evaluate

    return run_evaluate(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, EvaluateJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
