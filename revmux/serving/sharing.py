"""Task models that hold the same weights keep one copy of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone


def share_weights(backbone: Backbone, others: Iterable[Backbone]) -> int:
    """Let a frozen backbone use the tensors of others wherever they are equal, value by value.

    Two prompts on one language model share all of it; task models that were tuned above their lowest layers share
    these; models that have nothing in common stay as they are.

    Args:
        backbone: keeps its own tensors where no other has the same; frozen, and on its device.
        others: frozen.

    Returns:
        Bytes of the backbone that are shared.
    """
    shared = 0
    for other in others:
        theirs = {name: tensor for name, _, _, tensor in _tensors(other)}
        for name, owner, key, own in list(_tensors(backbone)):
            same = theirs.get(name)
            if same is None or not _equal(own, same):
                continue
            shared += own.numel() * own.element_size()
            if own is not same:
                setattr(owner, key, same)
    return shared


def _equal(own: Tensor, other: Tensor) -> bool:
    like = (own.shape, own.dtype, own.device) == (other.shape, other.dtype, other.device)
    return like and (own is other or torch.equal(own, other))


def _tensors(backbone: Backbone) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer with the module that holds it."""
    for prefix, module in backbone.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    yield f"{prefix}.{key}", module, key, tensor
