"""The memory that training needs, estimated before anything is loaded.

Weights, gradients and AdamW's moments are counted from shapes. Activations are the tensors that autograd keeps for the
backward pass: the model runs on fake tensors, and the sizes of those that are kept are added up. Temporary buffers of
kernels, fragmentation and the CUDA context are not included: leave a tenth plus one gigabyte for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from revmux.backbone import Backbone, TokenBatch
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.errors import UserError
from revmux.estimate.fake import call_with_fake_weights, fake_tensors, meta_copy
from revmux.estimate.serving_memory import check_length, kept_memory
from revmux.methods import Method
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of training, in bytes.

    Attributes:
        backbone: the backbone's weights.
        adapters: the method's weights, in fp32, LoRA's factors among them.
        prefix: states, keys and values of a constant prefix in the plain model.
        gradients: gradients of all trained weights, in fp32.
        optimizer: AdamW's two moments, in fp32.
        activations: tensors kept for the backward pass.
        working: temporary tensors of one prefill layer, which keeps none for the backward pass.
    """

    backbone: int
    adapters: int
    prefix: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(astuple(self))


def estimate_memory(
    backbone: Backbone,
    method: Method,
    prefill_layers: int,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of one training process.

    Args:
        backbone: the cut model, on any device, meta included.
        method: a method for it, on any device, meta included.
        prefill_layers: l.
        batch_size: inputs per step in this process, a multiple of N.
        length: S, tokens of the longest input.
        dtype: type of a frozen backbone's weights and activations; a tuned backbone has fp32 weights.
        gradient_checkpointing: keep only the input of each layer, decoder layers included, and recompute the layer.

    Raises:
        UserError: l is out of range, the batch cannot be divided into groups, or the inputs consist of the constant
            prefix alone.
    """
    check_length(backbone, length)
    model = meta_copy(
        MultiplexedClassifier(backbone, method, prefill_layers)
    )  # a copy, since it is frozen and unfrozen
    if batch_size < 1 or batch_size % method.num_inputs:
        raise UserError(f"batch_size ({batch_size}) must be divisible by num_inputs ({method.num_inputs})")
    model.backbone.requires_grad_(False)
    if method.tunes_backbone:
        model.method.unfreeze(model.backbone, prefill_layers)
    stored = torch.float32 if method.tunes_backbone else dtype
    model.backbone.to(stored)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = _SavedForBackward(model, batch_size, length, stored)
    model.backbone.gradient_checkpointing = False
    activations = saved.by_model()
    if gradient_checkpointing:
        # The inputs of all layers, plus all activations of the layer that is being recomputed.
        largest = saved.largest_layer
        model.backbone.gradient_checkpointing = True
        activations = min(activations, saved.by_model() + largest)
    return MemoryEstimate(
        backbone=sum(parameter.numel() for parameter in model.backbone.parameters()) * stored.itemsize,
        adapters=4 * sum(parameter.numel() for parameter in model.method.parameters()),
        prefix=kept_memory(model.backbone, []).prefix,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=activations,
        working=saved.by_prefill_layer(),
    )


class _SavedForBackward:
    """Counts the bytes that autograd saves in a forward pass, excluding weights; nothing is computed.

    Args:
        model: on the meta device, with the trained weights unfrozen.
        batch_size: inputs per batch.
        length: tokens per input.
        dtype: type of the backbone's weights; the method's weights are fp32.

    Attributes:
        largest_layer: most bytes that one layer of the backbone or of its decoder saved in the last pass.
    """

    def __init__(self, model: MultiplexedClassifier, batch_size: int, length: int, dtype: torch.dtype) -> None:
        self.model = model
        self.batch_size = batch_size
        self.length = length
        self.dtype = dtype
        self.largest_layer = 0
        self._saved: dict[int, Tensor] = {}

    def by_model(self) -> int:
        """Bytes saved by the whole model in a training step."""

        def step() -> object:
            return self.model.run_tokens(*self._inputs())

        return self._count(step)

    def by_prefill_layer(self) -> int:
        """Bytes that one prefill layer would save if gradients flowed through it."""
        backbone = self.model.backbone
        backbone.gradient_checkpointing = False

        def layer() -> object:
            tokens, _ = self.model.slot_tokens(*self._inputs())
            with torch.no_grad():
                state = backbone.embed(tokens)
            start = replace(state, hidden=state.hidden.detach().requires_grad_())
            self._saved.clear()
            return backbone.run(start, min(1, backbone.num_layers))

        return self._count(layer)

    def _inputs(self) -> tuple[TokenBatch, Tensor]:
        tokens = torch.ones(self.batch_size, self.length, dtype=torch.long)
        groups = torch.arange(self.batch_size).view(-1, self.model.num_inputs)
        return {"input_ids": tokens, "attention_mask": tokens}, groups

    def _count(self, function: Callable[[], object]) -> int:
        model = self.model
        self._saved.clear()
        self.largest_layer = 0

        def recorded() -> object:
            weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

            def record(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()._cdata
                if storage not in weights:
                    self._saved[storage] = tensor  # a reference, so that no other storage gets the same address
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), torch.enable_grad():
                return function()

        with self._layers_recorded(), fake_tensors():
            result = call_with_fake_weights(
                model.backbone, lambda: call_with_fake_weights(model.method, recorded, torch.float32), self.dtype
            )
        total = self._bytes()
        self._saved.clear()
        del result
        return total

    def _bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._saved.values())

    @contextmanager
    def _layers_recorded(self) -> Iterator[None]:
        """Record the most bytes that one layer saves, in ``largest_layer``."""
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
