"""How much memory training takes, before anything is loaded.

Weights, gradients and AdamW's moments are counted from shapes. Activations are what autograd keeps for the backward
pass: the model is walked through with tensors that have shapes but no values, and what is kept is added up. Temporary
buffers of kernels, fragmentation and the CUDA context are not in it: leave a tenth and a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revmux.backbone import Backbone, HiddenState
from revmux.errors import UserError
from revmux.methods import Method
from revmux.model import MultiplexedClassifier
from revmux.valueless import call_valueless, valueless


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training takes.

    Attributes:
        backbone: the backbone's weights.
        adapters: the method's weights, fp32.
        gradients: of everything trained, fp32.
        optimizer: AdamW's two moments, fp32.
        activations: kept from the forward for the backward pass.
        working: one layer of the prefill, which keeps nothing.
    """

    backbone: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Everything at once, in bytes."""
        return self.backbone + self.adapters + self.gradients + self.optimizer + self.activations + self.working


def plan_memory(
    backbone: Backbone,
    method: Method,
    prefill_layers: int,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = False,
) -> MemoryPlan:
    """The memory of one training process.

    Args:
        backbone: cut model, also on the meta device.
        method: adapters for it, also on the meta device.
        prefill_layers: l.
        batch_size: inputs a step in this process, a multiple of N.
        length: S, tokens of the longest input.
        dtype: type of a frozen backbone's weights and activations; a tuned one has fp32 weights.
        gradient_checkpointing: keep only the input of each upper layer, and compute the layer again.

    Raises:
        UserError: l is out of range, or the batch cannot be cut into groups.
    """
    model = MultiplexedClassifier(backbone, method, prefill_layers)
    if batch_size < 1 or batch_size % method.num_inputs:
        raise UserError(f"batch_size ({batch_size}) must be divisible by num_inputs ({method.num_inputs})")
    tuned = method.tunes_backbone
    stored = torch.float32 if tuned else dtype
    in_backbone = sum(parameter.numel() for parameter in backbone.parameters())
    in_method = sum(parameter.numel() for parameter in method.parameters())
    trained = method.tunable_parameters() + (in_backbone if tuned else 0)
    kept = _KeptForBackward(model, batch_size, length, stored)
    upper = method.exit_layer() - prefill_layers
    own = prefill_layers if method.tunes_prefill else 0  # prefill layers that a gradient goes back through
    if gradient_checkpointing:
        # Of all layers the inputs, and everything of the one layer that is being gone back through.
        activations = upper * kept.upper_boundary + own * kept.prefill_boundary
        activations += max(kept.upper_layer if upper else 0, kept.prefill_layer if own else 0)
    else:
        activations = upper * kept.upper_layer + own * kept.prefill_layer
    return MemoryPlan(
        backbone=in_backbone * stored.itemsize,
        adapters=4 * in_method,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=activations + kept.around_layers,
        working=kept.prefill_layer,
    )


class _KeptForBackward:
    """Bytes that autograd keeps, by part of the model; nothing is computed.

    Attributes:
        upper_layer: by one layer of the shared sequences.
        prefill_layer: by one layer of the plain inputs.
        upper_boundary: by the states between two upper layers.
        prefill_boundary: by the states between two prefill layers.
        around_layers: by multiplexer, demultiplexer and head, in fp32.
    """

    def __init__(self, model: MultiplexedClassifier, batch_size: int, length: int, dtype: torch.dtype) -> None:
        self.model = model
        with valueless():
            groups = torch.arange(batch_size).view(-1, model.num_inputs)
            tokens = torch.ones(batch_size, length, dtype=torch.long)
            state, mixed, self.around_layers = call_valueless(
                model, lambda: self._around(tokens, groups), torch.float32
            )
            backbone = model.backbone

            def one_layer(state: HiddenState) -> int:
                start = replace(state, hidden=state.hidden.detach().to(dtype).requires_grad_(), depth=0)
                return self._kept(lambda: backbone.run(start, min(1, backbone.num_layers)))

            self.upper_layer = call_valueless(model, lambda: one_layer(mixed), dtype)
            self.prefill_layer = call_valueless(model, lambda: one_layer(state), dtype)
        self.upper_boundary = mixed.hidden.numel() * dtype.itemsize
        self.prefill_boundary = state.hidden.numel() * dtype.itemsize

    def _around(self, tokens: Tensor, groups: Tensor) -> tuple[HiddenState, HiddenState, int]:
        model = self.model
        prepared, rows = model.slot_tokens({"input_ids": tokens, "attention_mask": tokens}, groups)
        with torch.set_grad_enabled(model.method.tunes_prefill):
            state = model.backbone.embed(prepared)
        own = model.backbone.own_answers(state)[rows]
        mixed = model.multiplex(state, rows)
        kept = self._kept(lambda: model.multiplex(state, rows))
        upper = replace(mixed, hidden=mixed.hidden.detach().requires_grad_(), depth=model.method.exit_layer())
        return state, mixed, kept + self._kept(lambda: model.answer(upper, own))

    def _kept(self, function: Callable[[], object]) -> int:
        """Bytes of the tensors, weights aside, that a backward pass of ``function`` would need."""
        weights = {parameter.untyped_storage()._cdata for parameter in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in weights:
                kept[storage] = tensor  # held, so that no other storage takes its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
            result = function()
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del result
        return total
