"""Classify a whole data set: with the plain model, with an adapter in full groups, or with a plan.

revmux classify --input 'reviews/*.parquet' --output answers --model runs/task-model --adapter runs/adapters/revmux-n4-l2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from ray_jobs import cli
from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.paths import absolute_location
from revmux.adapters.config import load_adapter_config
from revmux.bulk.location import with_absolute_paths
from revmux.bulk.units import list_work
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras


def main(job: ClassifyJob) -> None:
    """Check the settings and the input, classify all units, and write the summary.

    Raises:
        UserError: the settings or the input are wrong.
        Unfinished: units failed (status 3), or the audit stopped the job (status 4).
    """
    check_extras("train", "mlflow", "report")
    job = replace(job, input=absolute_location(job.input, "input"), output=absolute_location(job.output, "output"))
    job = with_absolute_paths(job)
    work = list_work(job)
    if job.model is not None:
        check_model(BackboneConfig(job.model), needs_answers=False)  # the adapter may record the prompt
    if job.adapter is not None and not job.adapter.startswith(("models:/", "runs:/")):
        load_adapter_config(job.adapter)
    from ray_jobs.bulk.run import run_classify

    run_classify(job, work)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, ClassifyJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
