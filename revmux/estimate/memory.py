"""How much memory training takes, before anything is loaded.

Weights, gradients and AdamW's moments are counted from shapes. Activations are what autograd keeps for the backward
pass: the model is walked through with tensors that have shapes but no values, and what is kept is added up. Temporary
buffers of kernels, fragmentation and the CUDA context are not in it: leave a tenth and a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revmux.backbone import Backbone, TokenBatch
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.errors import UserError
from revmux.estimate.fake import call_valueless, valueless, weightless
from revmux.methods import Method
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class MemoryEstimate:
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


def estimate_memory(
    backbone: Backbone,
    method: Method,
    prefill_layers: int,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """The memory of one training process.

    Args:
        backbone: cut model, also on the meta device.
        method: adapters for it, also on the meta device.
        prefill_layers: l.
        batch_size: inputs a step in this process, a multiple of N.
        length: S, tokens of the longest input.
        dtype: type of a frozen backbone's weights and activations; a tuned one has fp32 weights.
        gradient_checkpointing: keep only the input of each layer, a decoder's too, and compute the layer again.

    Raises:
        UserError: l is out of range, or the batch cannot be cut into groups.
    """
    model = weightless(MultiplexedClassifier(backbone, method, prefill_layers))  # a copy, to be frozen and unfrozen
    if batch_size < 1 or batch_size % method.num_inputs:
        raise UserError(f"batch_size ({batch_size}) must be divisible by num_inputs ({method.num_inputs})")
    model.backbone.requires_grad_(False)
    if method.tunes_backbone:
        model.method.unfreeze(model.backbone, prefill_layers)
    stored = torch.float32 if method.tunes_backbone else dtype
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = _KeptForBackward(model, batch_size, length, stored)
    model.backbone.gradient_checkpointing = False
    activations = kept.by_all()
    if gradient_checkpointing:
        # Of all layers the inputs, and everything of the one layer that is being gone back through.
        largest = kept.largest_layer
        model.backbone.gradient_checkpointing = True
        activations = min(activations, kept.by_all() + largest)
    return MemoryEstimate(
        backbone=sum(parameter.numel() for parameter in model.backbone.parameters()) * stored.itemsize,
        adapters=4 * sum(parameter.numel() for parameter in model.method.parameters()),
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=activations,
        working=kept.by_prefill_layer(),
    )


class _KeptForBackward:
    """Bytes that autograd keeps in a forward pass, weights aside; nothing is computed.

    Args:
        model: on the meta device, with what is trained unfrozen.
        batch_size: inputs.
        length: tokens an input.
        dtype: type of the backbone's weights; the method's are fp32.

    Attributes:
        largest_layer: the most that one layer of the backbone, or of its decoder, kept in the last pass.
    """

    def __init__(self, model: MultiplexedClassifier, batch_size: int, length: int, dtype: torch.dtype) -> None:
        self.model = model
        self.batch_size = batch_size
        self.length = length
        self.dtype = dtype
        self.largest_layer = 0
        self._kept: dict[int, Tensor] = {}

    def by_all(self) -> int:
        """By the whole model in a step of training."""

        def step() -> object:
            return self.model.run_tokens(*self._inputs())

        return self._count(step)

    def by_prefill_layer(self) -> int:
        """By one layer of the plain inputs, as if a gradient went back through it."""
        backbone = self.model.backbone
        backbone.gradient_checkpointing = False

        def layer() -> object:
            tokens, _ = self.model.slot_tokens(*self._inputs())
            with torch.no_grad():
                state = backbone.embed(tokens)
            start = replace(state, hidden=state.hidden.detach().requires_grad_())
            self._kept.clear()
            return backbone.run(start, min(1, backbone.num_layers))

        return self._count(layer)

    def _inputs(self) -> tuple[TokenBatch, Tensor]:
        tokens = torch.ones(self.batch_size, self.length, dtype=torch.long)
        groups = torch.arange(self.batch_size).view(-1, self.model.num_inputs)
        return {"input_ids": tokens, "attention_mask": tokens}, groups

    def _count(self, function: Callable[[], object]) -> int:
        model = self.model
        self._kept.clear()
        self.largest_layer = 0

        def watched() -> object:
            weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()._cdata
                if storage not in weights:
                    self._kept[storage] = tensor  # held, so that no other storage takes its address
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
                return function()

        with self._layers_watched(), valueless():
            result = call_valueless(
                model.backbone, lambda: call_valueless(model.method, watched, torch.float32), self.dtype
            )
        total = self._bytes()
        self._kept.clear()
        del result
        return total

    def _bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    @contextmanager
    def _layers_watched(self) -> Iterator[None]:
        """Note what each layer keeps beyond what was kept before it."""
        backbone = self.model.backbone
        layers = [backbone.layer(index) for index in range(backbone.num_layers)]
        if isinstance(backbone, EncoderDecoderBackbone):
            layers += list(backbone.decoder_layers())
        before = 0

        def enter(*_: object) -> None:
            nonlocal before
            before = self._bytes()

        def leave(*_: object) -> None:
            self.largest_layer = max(self.largest_layer, self._bytes() - before)

        handles = [layer.register_forward_pre_hook(enter) for layer in layers]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
