"""What is swept, where, and which trials are stopped early."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_jobs.cluster import ClusterConfig
from ray_jobs.tracking.config import TrackingConfig
from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import LossConfig, OptimConfig


@dataclass(frozen=True)
class StoppingConfig:
    """Which trials are stopped before their end.

    Args:
        enabled: whether any is.
        grace: epochs that every trial may run.
        reduction: of the trials of one cost, ASHA lets the best of so many go on from each rung.
        deviations: a trial is stopped too if one that costs no more was at the same epoch more accurate by so many
            standard errors.
    """

    enabled: bool = True
    grace: int = 1
    reduction: float = 3.0
    deviations: float = 3.0

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise UserError(f"grace is {self.grace}; choose 1 epoch or more")
        if not self.reduction > 1:
            raise UserError(f"reduction is {self.reduction}; choose more than 1, such as 3")
        if not self.deviations > 0:
            raise UserError(f"deviations is {self.deviations}; choose more than 0, such as 3")


@dataclass(frozen=True)
class TuneJob:
    """Settings of the job.

    Args:
        backbone: the frozen task model.
        data: the task.
        space: quick, paper, wide, or a YAML file of your own.
        trials: at most so many points of the space; by default as many as the space says.
        optim: how weights move, where the space does not say.
        loss: what they move towards, where the space does not say.
        store: where the backbone's answers are kept; all trials share it.
        shuffles: groupings that each trial's accuracy is a mean of.
        stopping: which trials are stopped early.
        retry_failed: try again the trials that failed in an earlier start of the same sweep.
        cluster: workers of one trial.
        concurrent_trials: trials side by side; by default as many as the resources that are there now hold. On a
            cluster that scales with demand, name how many it may grow to.
        tracking: MLflow.
        storage: folder of checkpoints, trials and the default MLflow store.
        name: of the sweep; the same name on the same task model and data goes on from where it was.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    space: str = "quick"
    trials: int | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 3
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    retry_failed: bool = False
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(workers=1))
    concurrent_trials: int | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    name: str = "sweep"

    def __post_init__(self) -> None:
        for name in ("concurrent_trials", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more, or leave it out")
