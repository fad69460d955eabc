"""Everything that determines a training run, as plain settings. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from revmux.data.config import DataConfig
from revmux.errors import UserError, one_of
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move.

    Args:
        epochs: passes over the training data.
        batch_size: inputs a step over all workers; a multiple of N times the number of workers times ``accumulate``.
        learning_rate: peak of AdamW's rate; the paper has 2e-5 over 50 epochs.
        weight_decay: AdamW's.
        warmup_share: share of the steps in which the rate rises; it then falls linearly to zero.
        clip: largest norm of the gradient.
        patience: epochs without a better selection accuracy after which training stops; 0 never stops early.
        seed: fixes weights, order and groups.
        accumulate: parts that each worker computes its share of a step in, one after the other, for batches that do
            not fit into memory. It changes nothing but rounding and dropout: InfoNCE's negatives are those of the
            whole step.
        precision: ``bfloat16`` computes steps under autocast while weights and optimiser stay in float32: for a GPU that
            tunes a backbone. A frozen backbone is smaller and faster with its own ``dtype`` set.
        gradient_checkpointing: keep only the input of each layer for the way back and compute the layer again:
            less memory, about a third more time. It changes no gradient.
    """

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.06
    clip: float = 1.0
    patience: int = 0
    seed: int = 0
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise one_of("precision", self.precision, ("float32", "bfloat16"), "choose one of these")
        for name in ("epochs", "batch_size", "learning_rate", "clip", "accumulate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose a value above 0")
        for name in ("weight_decay", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share is {self.warmup_share}; choose a share from 0 to below 1")

    def check_groups(self, num_inputs: int, workers: int) -> None:
        """Refuse a batch that cannot be cut into groups of N for every worker.

        Raises:
            UserError: naming the batch, N, the workers and the nearest batch that works.
        """
        unit = num_inputs * workers * self.accumulate
        if self.batch_size % unit:
            nearest = max(unit, round(self.batch_size / unit) * unit)
            names, factors = "num_inputs × workers", f"{num_inputs} × {workers}"
            if self.accumulate > 1:
                names, factors = f"{names} × accumulate", f"{factors} × {self.accumulate}"
            raise UserError(
                f"batch_size ({self.batch_size}) must be divisible by {names} ({factors} = {unit}); choose {nearest}"
            )


Negatives = Literal["batch", "group"]


Similarity = Literal["cosine", "dot"]


@dataclass(frozen=True)
class LossConfig:
    """What the adapters are trained for.

    Args:
        infonce_weight: λ; the paper uses 0.25 for BERT, 0.5 for T5 and LLaMA.
        negatives: ``batch``: every other input of the step, over all workers and micro-batches (stronger; the released
            code); ``group``: the other members of the group (the paper's text).
        similarity: ``cosine`` (the released code) or ``dot`` (the paper's text).
        temperature: τ that similarities are divided by; the released code has 0.05, the paper's text 1.
        distillation_weight: weight of the KL divergence from the teacher's label scores; 0 as in the paper.
    """

    infonce_weight: float = 0.25
    negatives: Negatives = "batch"
    similarity: Similarity = "cosine"
    temperature: float = 0.05
    distillation_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, legal in (("negatives", get_args(Negatives)), ("similarity", get_args(Similarity))):
            if getattr(self, name) not in legal:
                raise one_of(name, getattr(self, name), legal, "choose one of these")
        for name in ("infonce_weight", "distillation_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; choose a value above 0, such as 0.05")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Args:
        steps: optimiser steps between checkpoints within an epoch; 0 saves at the end of each epoch alone, which is
            always saved. A restart loses at most so many steps.
        keep: whole checkpoints that are kept, each with the best weights of its time; a damaged newest one is made up for
            by the one before.
    """

    steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"checkpoint steps is {self.steps}; choose 0 or more")
        if self.keep < 2:
            raise UserError(f"checkpoint keep is {self.keep}; choose 2 or more: the newest may be damaged")


@dataclass(frozen=True)
class MethodConfig:
    """The system that is trained.

    Args:
        name: ``revmux``, ``token-split``, ``exit-head`` or another registered method.
        num_inputs: N, inputs that share a pass.
        prefill_layers: l, layers that each input runs through alone.
        options: the method's own settings by name; ``python -m revmux methods`` lists them.
    """

    name: str = "revmux"
    num_inputs: int = 2
    prefill_layers: int = 2
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights that come out.

    Args:
        backbone: the frozen task model.
        data: the task.
        method: the system.
        optim: how weights move.
        loss: what they move towards.
        store: where the backbone's answers are kept between epochs and runs.
        shuffles: groupings of the test split that the reported accuracy is a mean of.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 10
