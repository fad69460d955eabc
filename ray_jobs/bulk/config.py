"""Settings of the classification job. This module imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_jobs.cluster import ClusterConfig
from ray_jobs.tracking.config import TrackingConfig
from revmux.bulk.config import BulkConfig
from revmux.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ClassifyJob(BulkConfig):
    """Settings of the job.

    Args:
        cluster: Workers, each with its own copy of the model, and the Ray cluster that they run on. The job starts with
            the workers that the cluster has room for, and uses more as machines join. A lost worker is replaced; the job
            fails if more than max_failures workers in a row die while they load the model.
        tracking: MLflow tracking.
        storage: Folder for Ray's log and the default MLflow store, or a URI such as s3://bucket/runs, with which
            tracking.uri must be set. In a submitted job it must not be a relative path.
        name: Name of the run in MLflow.
        progress_seconds: Seconds between progress lines. Above 0.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    name: str = "classify"
    progress_seconds: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.progress_seconds <= 0:
            raise UserError(f"progress_seconds is {self.progress_seconds}; choose more than 0, such as 10")
