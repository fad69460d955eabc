"""The tasks of the front: their data, and the task model of each, tuned through all layers on the training inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison.systems import Ready
from benchmarks.trained import tuned_task_model
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.plan.build import for_choosing
from revmux.plan.config import SplitConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import OptimConfig

KEPT = Path("runs/front")


@dataclass(frozen=True)
class FrontTask:
    """One task and how much is trained on it.

    Attributes:
        name: name of the task; with ``in_glue``, also that of its folder.
        in_glue: whether the data is a folder of GLUE.
        data: settings of the data; ``source`` is replaced for GLUE.
        splitting: the choosing set.
        tuning: optimizer of the task model.
        epochs: epochs of the adapters with N of 4 and fewer; wider ones, whose epochs are cheaper, get twice as many.
        max_length: tokens to which an input is truncated.
    """

    name: str
    in_glue: bool
    data: DataConfig
    splitting: SplitConfig
    tuning: OptimConfig
    epochs: int
    max_length: int = 64

    def epochs_of(self, num_inputs: int) -> int:
        """Epochs of an adapter."""
        return self.epochs if num_inputs <= 4 else 2 * self.epochs


TASKS = {
    task.name: task
    for task in (
        FrontTask(
            "SST-2",
            True,
            DataConfig(selection_share=0.03),
            SplitConfig(0.15, 8000),
            OptimConfig(3, 32, 1e-4, precision="bfloat16"),
            2,
        ),
        FrontTask(
            "sentiment",
            False,
            DataConfig("sentiment"),
            SplitConfig(0.3, 4000),
            OptimConfig(2, 32, 1e-4, precision="bfloat16"),
            6,
        ),
        FrontTask("MRPC", True, DataConfig(), SplitConfig(0.2), OptimConfig(4, 16, 1e-4, precision="bfloat16"), 12, 96),
        FrontTask(
            "docstrings",
            False,
            DataConfig("docstrings", per_class=3000),
            SplitConfig(0.25, 4000),
            OptimConfig(4, 32, 1e-4, precision="bfloat16"),
            6,
            96,
        ),
    )
}


def ready(name: str, glue: Path | None) -> Ready:
    """Load a task, and tune its task model if that has not been done.

    Args:
        name: a key of :data:`TASKS`.
        glue: folder with the tasks of GLUE.
    """
    spec = TASKS[name]
    data = spec.data
    if spec.in_glue:
        assert glue is not None
        data = DataConfig(str(glue / name), selection_share=spec.data.selection_share)
    task, folder = load_task(data), KEPT / name
    choosing = for_choosing(task, spec.splitting)
    embedded = BackboneConfig(max_length=spec.max_length)
    model = tuned_task_model(embedded, data, choosing, spec.tuning, 0, folder)
    backbone = BackboneConfig(str(model), max_length=spec.max_length)
    return Ready(name, task, choosing, data, backbone, StoreConfig(root=str(folder / "features")), folder)
