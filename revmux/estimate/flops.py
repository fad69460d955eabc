"""What an input costs: counted floating-point operations, and the speed-up that they allow.

The model runs once on the meta device, where tensors have shapes but no values: nothing is computed, and a backbone
whose weights were never loaded is counted too. PyTorch's own formulas count matrix products, convolutions and
attention kernels, at two operations per multiply-add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from revmux.backbone import Backbone
from revmux.estimate.fake import VALUE_QUESTIONS, weightless
from revmux.methods import BackboneShape, Method, Siso
from revmux.model import MultiplexedClassifier

GROUPS = 2**16
"""Groups in the counted batch. Work that a batch does once, such as DeBERTa's projection of its relative positions,
then adds next to nothing to an input."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations per input, by stage.

    Attributes:
        prefill: embedding and layers 1..l, alone.
        multiplex: the way into the shared sequence.
        upper: this input's share of layers l+1..e.
        head: a decoder where there is one, demultiplexer and classifier.
    """

    prefill: float
    multiplex: float
    upper: float
    head: float

    @property
    def per_input(self) -> float:
        """All stages together."""
        return self.prefill + self.multiplex + self.upper + self.head


def count_flops(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> Cost:
    """Operations per input of a full group, all inputs of one length.

    Args:
        backbone: cut model, on any device.
        method: adapters for it, on any device.
        prefill_layers: l.
        length: S, tokens per input.

    Raises:
        UserError: l is out of range for this backbone and method.
    """
    model = weightless(MultiplexedClassifier(backbone, method, prefill_layers)).eval()
    rows = GROUPS * model.num_inputs
    done: dict[str, int] = {}
    with torch.device("meta"), torch.no_grad(), _OperationCounter() as counter:
        ones = torch.ones(rows, length, dtype=torch.long)
        groups = torch.arange(rows).view(GROUPS, model.num_inputs)

        def end(stage: str) -> None:
            done[stage] = counter.total - sum(done.values())

        model.run_tokens({"input_ids": ones, "attention_mask": ones}, groups, end)
    return Cost(**{stage: operations / rows for stage, operations in done.items()})


def plain_cost(backbone: Backbone, length: int, prefill_layers: int = 0) -> Cost:
    """Operations per input of the plain model (SISO); layers 1..l count as its prefill."""
    return count_flops(backbone, Siso(BackboneShape.of(backbone)), prefill_layers, length)


def relative_cost(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> float:
    """Cost per input over the cost of the same input alone (SISO) on the same backbone; 0.5 is twice as fast."""
    alone = plain_cost(backbone, length).per_input
    return count_flops(backbone, method, prefill_layers, length).per_input / alone


def resume_cost(backbone: Backbone, prefill_layers: int, length: int) -> float:
    """Cost of an input that resumes alone after layer l, relative to SISO: layers l+1..L, a decoder, the model's head."""
    alone = plain_cost(backbone, length, prefill_layers)
    return (alone.per_input - alone.prefill) / alone.per_input


def rival_exit_layer(backbone: Backbone, method: Method, prefill_layers: int, length: int) -> int:
    """The deepest layer, at least 1, at which an exit head costs no more than a method: e/L at most its relative cost."""
    return max(1, int(relative_cost(backbone, method, prefill_layers, length) * backbone.num_layers))


def speedup_ceiling(num_layers: int, prefill_layers: int, num_inputs: int, exit_layer: int | None = None) -> float:
    """N·L / (N·l + e − l): the speed-up over SISO if the cut layers were all that costs; e is L by default.

    An encoder-decoder can be above it: its decoder stands above the cut, and a group shares it too.
    """
    depth = num_layers if exit_layer is None else exit_layer
    layers = num_inputs * prefill_layers + depth - prefill_layers
    return num_inputs * num_layers / layers if layers else math.inf


class _OperationCounter(TorchDispatchMode):
    """Adds up the operations of what runs on the meta device, by PyTorch's own formulas.

    ``FlopCounterMode`` supplies the formulas. It is not entered, because it adds hooks to every module of the process,
    and a server counts while its model runs in another thread.

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
        if function in VALUE_QUESTIONS:
            return True
        output = function(*args, **kwargs)
        formula = self._formulas.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        return output
