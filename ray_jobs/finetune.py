"""Tune a backbone to a task. The result is the SISO model, which is frozen afterwards. A model that is already a classifier needs no tuning.

revmux finetune --data.source reviews.csv --output runs/task-model
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs import cli
from ray_jobs.training.config import FinetuneJob
from revmux.data.peek import check_source
from revmux.errors import UserError
from revmux.pretrained.location import check_model, locate, peft_settings
from revmux.utils.extras import check_extras

if TYPE_CHECKING:
    from ray_jobs.training.launch import Trained


def main(job: FinetuneJob) -> Trained:
    """Check the settings, then tune, evaluate and record the task model."""
    check_extras("train", "mlflow")
    if job.backbone.dtype != "float32":
        raise UserError(f"dtype is {job.backbone.dtype}, but tuning requires float32; omit --backbone.dtype")
    check_model(job.backbone, needs_answers=False)
    if job.lora_rank:
        check_extras("peft")
        if peft_settings(Path(locate(job.backbone.model))) is not None:
            raise UserError(
                f"{job.backbone.model} is a PEFT adapter, and LoRA on top of it would not be one on its base; name its "
                "base model, or omit --lora_rank"
            )
    check_source(job.data)
    from ray_jobs.training.task_model import run_finetune

    return run_finetune(job)


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run this job from a command line; returns the exit status, see :func:`ray_jobs.cli.run`."""
    return cli.run(main, FinetuneJob, __doc__, argv, prog)


if __name__ == "__main__":
    sys.exit(command())
