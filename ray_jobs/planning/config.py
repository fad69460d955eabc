"""Settings of the plan job. This module imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_jobs.cluster import check_port_number
from ray_jobs.sweep.config import TuneJob
from revmux.errors import UserError
from revmux.plan.config import Goal, MeasureConfig, SplitConfig
from revmux.training.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class PlanJob(TuneJob):
    """Settings of the job. It first runs a sweep, which has the settings of ``tune``.

    Args:
        goal: Allowed loss of accuracy, or the required throughput.
        choosing: Choosing set: a slice of the training data that is held back from training and used to choose the
            system.
        measure: How systems are measured on this hardware.
        tuning: Optimizer and schedule for tuning the backbone first, if it has no classification head.
        frozen_layers: Number of lowest layers that this tuning leaves unchanged. 0 tunes the whole model.
        register: Name of the registered model in MLflow. The served systems and the two ends of the front
            become its versions.
        host: Interface that the planned server listens on.
        port: TCP port of the planned server, 1 to 65535.
        space: Search space of the sweep: plan, wide, quick, paper, or a YAML file.
        name: Name of the plan and of its sweep. The same name with the same task model and data resumes where it
            stopped.
    """

    goal: Goal
    choosing: SplitConfig = field(default_factory=SplitConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tuning: OptimConfig = field(default_factory=lambda: OptimConfig(epochs=3, learning_rate=1e-4))
    frozen_layers: int = 0
    register: str = "plan"
    host: str = "127.0.0.1"
    port: int = 8000
    space: str = "plan"
    name: str = "plan"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_port_number(self.port)
        if self.frozen_layers < 0:
            raise UserError(f"frozen_layers is {self.frozen_layers}; choose 0 or more")
