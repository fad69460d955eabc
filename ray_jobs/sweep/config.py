"""Settings of a sweep and of its early stopping. This module imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_jobs.cluster import ClusterConfig
from ray_jobs.tracking.config import TrackingConfig
from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.recipes import DEFAULT_RECIPE, named_recipe


@dataclass(frozen=True)
class StoppingConfig:
    """Early stopping of trials.

    Args:
        enabled: Whether trials are stopped early.
        grace: Share of its epochs that every trial runs before it can be stopped. Above 0 and below 1.
        reduction: Reduction factor of ASHA. Of the trials of one method and equal cost, one in this many continues after each
            rung. Above 1.
        deviations: Number of standard errors. A trial is stopped if another trial of the same method and equal or lower
            cost is more accurate by this much after the same share of its epochs. Above 0.
    """

    enabled: bool = True
    grace: float = 0.3
    reduction: float = 3.0
    deviations: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.grace < 1:
            raise UserError(f"grace is {self.grace}; choose a share of the epochs between 0 and 1, such as 0.3")
        if not self.reduction > 1:
            raise UserError(f"reduction is {self.reduction}; choose more than 1, such as 3")
        if not self.deviations > 0:
            raise UserError(f"deviations is {self.deviations}; choose more than 0, such as 3")


@dataclass(frozen=True)
class TuneJob:
    """Settings of the job.

    Args:
        backbone: Frozen task model.
        data: Labelled text.
        space: Search space: quick, plan, paper, wide, or a YAML file.
        trials: Maximum number of points of the space to try. At least 1. Default: the number that the space sets.
        optim: Optimizer and schedule.
        loss: Training loss. The scores of the plain model are distilled by default.
        store: Feature store, which all trials share.
        shuffles: Number of random groupings to average each trial's accuracy over. At least 1.
        stopping: Early stopping of trials.
        retry_failed: Whether to retry trials that failed in an earlier start of the same sweep.
        cluster: Workers of one trial, and the Ray cluster that they run on.
        concurrent_trials: Maximum number of trials that run at the same time. At least 1. Default: as many as the
            current resources allow. On an autoscaling cluster, set the number that should run once it has scaled up.
        tracking: MLflow tracking.
        storage: Folder for checkpoints, trials and the default MLflow store, or a URI such as s3://bucket/runs, with which
            tracking.uri must be set. In a submitted job it must not be a relative path.
        name: Name of the sweep. The same name with the same task model and data resumes where it stopped.
        recipe: Named recipe of all trials: strong, paper, or a YAML file, unless the space sets it. It supplies the optimizer,
            the loss and the methods' options, which the space and the other settings override one by one.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    space: str = "quick"
    trials: int | None = None
    optim: OptimConfig = field(default_factory=lambda: named_recipe().optim_config())
    loss: LossConfig = field(default_factory=lambda: named_recipe().loss_config())
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 3
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    retry_failed: bool = False
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(workers=1))
    concurrent_trials: int | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    name: str = "sweep"
    recipe: str = DEFAULT_RECIPE

    def __post_init__(self) -> None:
        for name in ("concurrent_trials", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more, or omit it")
        named_recipe(self.recipe)
        if self.shuffles < 1:
            raise UserError(f"shuffles is {self.shuffles}; choose 1 or more")
