"""Cost per input: the number of floating-point operations, and the speed-up that it allows.

The model runs once on the meta device, where tensors have shapes but no values. Nothing is computed, so a backbone
whose weights are not loaded can be counted too. PyTorch's own formulas count matrix products, convolutions and
attention kernels, with two operations per multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from revmux.backbone import Backbone
from revmux.estimate.fake import VALUE_READS, meta_copy
from revmux.methods import BackboneShape, Method, Siso
from revmux.model import MultiplexedClassifier

GROUPS = 2**16
"""Groups in the counted batch. Work that is done once per batch, such as DeBERTa's projection of relative positions,
then adds almost nothing to the cost per input."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations per input, by stage.

    Attributes:
        prefill: embedding and layers 1..l, for each input alone.
        multiplex: the multiplexer.
        upper: this input's share of layers l+1..e.
        head: the decoder if there is one, the demultiplexer and the classifier.
    """

    prefill: float
    multiplex: float
    upper: float
    head: float

    @property
    def per_input(self) -> float:
        """The sum of all stages."""
        return self.prefill + self.multiplex + self.upper + self.head


def count_flops(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> Cost:
    """Operations per input of a full group whose inputs have the same length.

    Args:
        backbone: the cut model, on any device.
        method: a method for it, on any device.
        prefill_layers: l.
        length: S, tokens per input.

    Raises:
        UserError: l is out of range for this backbone and method.
    """
    model = meta_copy(MultiplexedClassifier(backbone, method, prefill_layers)).eval()
    rows = GROUPS * model.num_inputs
    done: dict[str, int] = {}
    with torch.device("meta"), torch.no_grad(), _OperationCounter() as counter:
        ones = torch.ones(rows, length, dtype=torch.long)
        groups = torch.arange(rows).view(GROUPS, model.num_inputs)

        def end_stage(stage: str) -> None:
            done[stage] = counter.total - sum(done.values())

        model.run_tokens({"input_ids": ones, "attention_mask": ones}, groups, end_stage)
    return Cost(**{stage: operations / rows for stage, operations in done.items()})


def plain_cost(backbone: Backbone, length: int, prefill_layers: int = 0) -> Cost:
    """Operations per input of the plain model (SISO); layers 1..l count as its prefill."""
    return count_flops(backbone, Siso(BackboneShape.of(backbone)), prefill_layers, length)


def relative_cost(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> float:
    """Cost per input divided by that of SISO on the same backbone; 0.5 is twice as fast."""
    alone = plain_cost(backbone, length).per_input
    return count_flops(backbone, method, prefill_layers, length).per_input / alone


def resume_cost(backbone: Backbone, prefill_layers: int, length: int) -> float:
    """Cost of resuming one input alone after layer l (layers l+1..L, a decoder, the model's head), relative to SISO."""
    alone = plain_cost(backbone, length, prefill_layers)
    return (alone.per_input - alone.prefill) / alone.per_input


@dataclass(frozen=True)
class LadderCost:
    """Cost per input of a ladder as a function of the shares that go on, relative to SISO.

    Attributes:
        first: cost of the first stage, which answers every input.
        next: for each stage, the cost of an input that it does not answer: the plain layers up to the next stage and
            the input's share of a full group there, or for the last stage the rest of the plain model.
    """

    first: float
    next: tuple[float, ...]

    def at(self, going_on: Sequence[float]) -> float:
        """The cost at given shares.

        Args:
            going_on: for each stage, the share of all inputs that neither it nor an earlier stage answers. The last
                share is that of the plain model.
        """
        return self.first + sum(share * cost for share, cost in zip(going_on, self.next, strict=True))


def ladder_cost(models: Sequence[MultiplexedClassifier], length: int) -> LadderCost:
    """Counted cost of the stages of a ladder; one stage is the plain fallback.

    Args:
        models: the model of each stage.
        length: S, tokens per input.
    """
    backbone = models[0].backbone
    plain = plain_cost(backbone, length).per_input
    costs = [count_flops(backbone, model.method, model.prefill_layers, length) for model in models]
    steps = [
        (after.per_input - before.prefill) / plain  # the layers in between, and the share of a group
        for before, after in pairwise(costs)
    ]
    resumed = resume_cost(backbone, models[-1].prefill_layers, length)
    return LadderCost(costs[0].per_input / plain, (*steps, resumed))


def rival_exit_layer(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> int:
    """The deepest layer e, at least 1, at which an exit head costs no more than a method (e/L ≤ its relative cost)."""
    return max(1, int(relative_cost(backbone, method, prefill_layers, length) * backbone.num_layers))


def speedup_ceiling(num_layers: int, prefill_layers: int, num_inputs: int, exit_layer: int | None = None) -> float:
    """N·L / (N·l + e − l): the speed-up over SISO if only the cut layers had a cost; e is L by default.

    The speed-up of an encoder-decoder can exceed it, because a group shares the decoder too.
    """
    depth = num_layers if exit_layer is None else exit_layer
    layers = num_inputs * prefill_layers + depth - prefill_layers
    return num_inputs * num_layers / layers if layers else math.inf


class _OperationCounter(TorchDispatchMode):
    """Counts the operations that run on the meta device, by PyTorch's own formulas.

    ``FlopCounterMode`` supplies the formulas. It is not used as a mode itself, because it adds hooks to every module
    of the process, and a server counts while its model runs in another thread.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # unannotated in torch
        self.total = 0
        self._formulas = FlopCounterMode(display=False).flop_registry

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in VALUE_READS:
            return True
        output = function(*args, **kwargs)
        formula = self._formulas.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        return output
