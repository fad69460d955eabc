"""The settings of a training run. This module imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from revmux.data.config import DataConfig
from revmux.errors import UserError, one_of
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.utils.plugins import has_plugins


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Args:
        epochs: Number of passes over the training data. At least 1.
        batch_size: Inputs per optimizer step, over all workers. A multiple of N x workers x accumulate.
        learning_rate: Peak learning rate of AdamW. Above 0. The paper uses 2e-5 over 50 epochs.
        backbone_learning_rate: Peak learning rate of the backbone's weights if the method tunes them. Default: learning_rate.
        weight_decay: Weight decay of AdamW. 0 or more.
        warmup_share: Share of the steps during which the learning rate rises linearly. Afterwards it falls linearly to
            zero. From 0 to below 1.
        clip: Maximum norm of the gradient. Above 0.
        patience: Number of epochs without a better accuracy on the selection set after which training stops. 0 disables
            early stopping.
        seed: Random seed of initial weights, data order and groups.
        accumulate: Number of micro-batches per optimizer step on each worker, for batches that do not fit into memory.
            The result differs only by rounding and dropout, because InfoNCE uses the negatives of the whole step. At
            least 1.
        precision: bfloat16 runs training steps under autocast and keeps weights and optimizer state in float32. Use it to
            tune a backbone on a GPU. For a frozen backbone, setting its dtype saves more memory and time.
        gradient_checkpointing: Recompute each layer in the backward pass instead of keeping its activations. This uses
            less memory and takes about a third more time. Gradients do not change.
    """

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 5e-4
    backbone_learning_rate: float | None = None
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
        if self.backbone_learning_rate is not None and not self.backbone_learning_rate > 0:
            raise UserError(
                f"backbone_learning_rate is {self.backbone_learning_rate}; choose a value above 0, or omit it"
            )
        for name in ("weight_decay", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share is {self.warmup_share}; choose a share from 0 to below 1")

    def check_groups(self, num_inputs: int, workers: int) -> None:
        """Check that the batch can be divided into groups of N, with at least one group per worker and micro-batch.

        Workers may have different numbers of groups: each counts by its share of the step.

        Raises:
            UserError: it cannot; the message has the batch size, N, the workers and the nearest batch size that works.
        """
        least = num_inputs * workers * self.accumulate
        if self.batch_size % num_inputs:
            nearest = max(least, round(self.batch_size / num_inputs) * num_inputs)
            raise UserError(
                f"batch_size ({self.batch_size}) must be divisible by num_inputs ({num_inputs}); choose {nearest}"
            )
        if self.batch_size < least:
            names, factors = "num_inputs × workers", f"{num_inputs} × {workers}"
            if self.accumulate > 1:
                names, factors = f"{names} × accumulate", f"{factors} × {self.accumulate}"
            raise UserError(
                f"batch_size ({self.batch_size}) is too small for {names} ({factors} = {least}): every worker needs a group; "
                f"choose {least} or more"
            )


Negatives = Literal["batch", "group"]


Similarity = Literal["cosine", "dot"]


@dataclass(frozen=True)
class LossConfig:
    """The training loss: cross-entropy + λ · InfoNCE + distillation.

    Args:
        infonce_weight: Weight λ of the InfoNCE loss. 0 or more. The paper uses 0.25 for BERT and 0.5 for T5 and LLaMA.
        negatives: Negatives of InfoNCE. batch: every other input of the step, over all workers and micro-batches (as in the
            released code). group: the other inputs of the group (as in the paper's text).
        similarity: Similarity in InfoNCE: cosine (as in the released code) or dot product (as in the paper's text).
        temperature: Temperature τ that similarities are divided by. Above 0. The released code uses 0.05, the paper's text 1.
        distillation_weight: Weight of the KL divergence from the teacher's label scores. 0 or more. The paper uses none.
    """

    infonce_weight: float = 0.25
    negatives: Negatives = "batch"
    similarity: Similarity = "cosine"
    temperature: float = 0.05
    distillation_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, valid in (("negatives", get_args(Negatives)), ("similarity", get_args(Similarity))):
            if getattr(self, name) not in valid:
                raise one_of(name, getattr(self, name), valid, "choose one of these")
        for name in ("infonce_weight", "distillation_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; choose a value above 0, such as 0.05")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved.

    Args:
        steps: Optimizer steps between checkpoints within an epoch. A restart repeats at most this many steps. 0 saves
            only at the end of each epoch, where a checkpoint is always saved.
        keep: Number of checkpoints to keep. At least 2: if the newest is damaged, a run resumes from the one before.
    """

    steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"checkpoint steps is {self.steps}; choose 0 or more")
        if self.keep < 2:
            raise UserError(f"checkpoint keep is {self.keep}; choose 2 or more, since the newest can be damaged")


PLAIN_METHOD = "siso"
"""Name of the plain model, which has no adapters to train."""

METHOD_NAMES = (
    "datamux",
    "exit-head",
    "mux-plm",
    "only-multiplexer-reversible",
    "revmux",
    PLAIN_METHOD,
    "skip-only",
    "token-split",
    "vanilla-adapter",
)
"""The methods of this package, listed here so that a misspelled name is rejected before torch is imported."""


def check_method_name(name: str) -> None:
    """Check that a method exists in this package, or that an installed plugin could define it.

    Raises:
        UserError: it cannot exist; the message lists the methods.
    """
    if name not in METHOD_NAMES and not has_plugins("revmux.methods"):
        raise one_of("method", name, METHOD_NAMES, "docs/add-a-method.md shows how to add one")


@dataclass(frozen=True)
class MethodConfig:
    """The method to train.

    Args:
        name: Name of the method, such as revmux, token-split or exit-head. revmux methods lists all.
        num_inputs: Width N: number of inputs that share a pass through the upper layers.
        prefill_layers: Number of prefill layers l, through which each input runs alone. 0 to the number of layers.
        options: Options of the method by name, as a mapping such as {own_state: mlp}. revmux methods lists them.
    """

    name: str = "revmux"
    num_inputs: int = 2
    prefill_layers: int = 2
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the trained weights.

    Args:
        backbone: Frozen task model.
        data: Labelled text.
        method: Method to train.
        optim: Optimizer and schedule.
        loss: Training loss.
        store: Feature store for the frozen model's states.
        shuffles: Number of random groupings of the test split to average the reported accuracy over.
        name: The named recipe that these settings started from. Default: none.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    shuffles: int = 10
    name: str = ""
