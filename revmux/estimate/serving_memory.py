"""The memory that serving needs: what a replica keeps, and what a pass takes on top.

What is kept is counted on the tensors themselves, so the same count holds for a loaded model and, before anything is
loaded, for one on the meta device. A pass runs on fake tensors. Buffers inside kernels, fragmentation and the CUDA
context are not included: leave a tenth plus one gigabyte for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState
from revmux.backbone.state import Prefix
from revmux.errors import UserError
from revmux.estimate.fake import AssumeTrue, call_with_fake_weights, fake_tensors, meta_copy
from revmux.estimate.peak import PeakMemory, StorageCounter
from revmux.fallback import resume
from revmux.grouping import consecutive_groups
from revmux.model import MultiplexedClassifier


@dataclass(frozen=True)
class AdapterMemory:
    """What an adapter keeps in memory, in bytes.

    Attributes:
        weights: its own weights, LoRA's factors among them.
        merged: the copy of the weights into which LoRA's updates are merged; 0 if there is none.
        unmerged: the size that the copy would have, if the limit does not allow it.
        prefix: states, keys and values of the mixed constant prefix.
    """

    weights: int
    merged: int
    unmerged: int
    prefix: int

    @property
    def total(self) -> int:
        """What is kept, in bytes."""
        return self.weights + self.merged + self.prefix


@dataclass(frozen=True)
class KeptMemory:
    """What a task keeps in memory, in bytes. What an earlier task has already is not counted again.

    Attributes:
        backbone: weights and buffers of the task model.
        prefix: states, keys and values of the plain model's constant prefix.
        adapters: what each adapter keeps.
    """

    backbone: int
    prefix: int
    adapters: tuple[AdapterMemory, ...]

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.backbone + self.prefix + sum(adapter.total for adapter in self.adapters)


def kept_memory(
    backbone: Backbone, models: Sequence[MultiplexedClassifier], counter: StorageCounter | None = None
) -> KeptMemory:
    """Count what a frozen backbone and its adapters keep. Constant prefixes that are not computed yet are computed.

    Args:
        backbone: the frozen task model, on any device, meta included.
        models: the adapters on this backbone, in eval mode.
        counter: has counted the tasks before this one.
    """
    counter = StorageCounter() if counter is None else counter
    without_values = AssumeTrue() if backbone.device.type == "meta" else nullcontext()  # type: ignore[no-untyped-call]  # unannotated in torch
    with torch.no_grad(), without_values:
        weights = counter.add(_tensors(backbone))
        plain = backbone.constant_prefix()
        prefix = counter.add(_prefix_tensors(plain))
        return KeptMemory(weights, prefix, tuple(_adapter_memory(model, plain, counter) for model in models))


def check_length(backbone: Backbone, length: int) -> None:
    """Check that inputs have tokens of their own after a constant prefix.

    Raises:
        UserError: they have none.
    """
    constant = len(getattr(backbone, "constant_tokens", ()))
    if length <= constant:
        raise UserError(
            f"length is {length}, but {constant} tokens are the same in every input; choose {constant + 1} or more, or "
            "fewer constant tokens"
        )


def _adapter_memory(model: MultiplexedClassifier, plain: Prefix | None, counter: StorageCounter) -> AdapterMemory:
    method = model.method
    weights = counter.add(_tensors(method))
    merged = counter.add(_tensors(model.upper_backbone))
    needed = 0 if method.lora is None else method.lora.merged_bytes(model.backbone)
    mixes = plain is not None and not (method.prepares_tokens or method.reads_whole_inputs)
    prefix = counter.add(_prefix_tensors(model.upper_prefix(plain))) if mixes and plain is not None else 0
    return AdapterMemory(weights, merged, 0 if merged else needed, prefix)


def pass_memory(
    backbone: Backbone,
    models: Sequence[MultiplexedClassifier],
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """The most bytes that one pass holds besides what is kept: no stage answers, and the plain model answers every input.

    LoRA's updates are computed apart, which takes slightly more than merged ones.

    Args:
        backbone: the task model, on any device, meta included.
        models: the stages of a ladder, or one adapter; without any, the plain model alone.
        batch_size: inputs per pass.
        length: S, tokens per input, with those of a constant prefix.
        dtype: type of the backbone's weights.

    Raises:
        UserError: there are no inputs, they consist of the constant prefix alone, or they do not fit the backbone.
    """
    check_length(backbone, length)
    if batch_size < 1:
        raise UserError(f"max_batch is {batch_size}; choose 1 or more inputs, such as 128")
    parts = meta_copy(nn.ModuleList([backbone, *(model.method for model in models)]))
    own: Backbone = parts[0]  # type: ignore[assignment]
    stages = [
        MultiplexedClassifier(own, method, model.prefill_layers).eval()  # type: ignore[arg-type]
        for method, model in zip(parts[1:], models, strict=True)
    ]

    def measured() -> int:
        _run_pass(own, stages, batch_size, length)  # computes the constant prefixes, which are kept
        memory = PeakMemory()
        with memory:
            _run_pass(own, stages, batch_size, length)
        return memory.peak

    with torch.no_grad(), fake_tensors():
        peak: int = call_with_fake_weights(
            own, lambda: call_with_fake_weights(nn.ModuleList(parts[1:]), measured, torch.float32), dtype
        )
        return peak


def _run_pass(backbone: Backbone, stages: Sequence[MultiplexedClassifier], batch_size: int, length: int) -> None:
    """All stages and then the plain model, as in a pass whose inputs go on from every stage."""
    ids = torch.ones(batch_size, length, dtype=torch.long)
    tokens, rows = {"input_ids": ids, "attention_mask": ids}, torch.arange(batch_size)
    first: HiddenState | None = None
    state: HiddenState | None = None
    for model in stages:
        prepared, groups = model.slot_tokens(tokens, consecutive_groups(batch_size, model.num_inputs))
        if model.method.prepares_tokens:  # the only stage, without a threshold
            model.run_groups(model.prefill(prepared), groups)
            continue
        state = model.prefill(tokens) if state is None else backbone.run(state.take(rows), model.prefill_layers)
        first = state if first is None else first  # kept until the end of the pass
        model.run_groups(state, groups)
    if state is None:
        backbone(tokens)
    else:
        resume(backbone, state.take(rows))


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())


def _prefix_tensors(prefix: Prefix | None) -> list[Tensor]:
    if prefix is None:
        return []
    positions = [] if prefix.positions is None else [prefix.positions]
    return [*prefix.hidden.values(), *chain.from_iterable(prefix.layers.values()), *positions]
