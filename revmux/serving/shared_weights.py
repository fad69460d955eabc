"""Keep one copy in memory of the weights that several task models have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone


def share_weights(backbone: Backbone, others: Iterable[Backbone]) -> int:
    """Replace the tensors of a frozen backbone by those of other backbones that have the same name and equal values.

    Two prompts on one language model share all weights. Task models that were tuned only in their upper layers share
    the lower ones. Other models remain unchanged.

    Args:
        backbone: frozen, and on its device. It keeps the tensors that no other backbone has.
        others: frozen.

    Returns:
        Number of bytes of the backbone that are shared.
    """
    shared = 0
    for other in others:
        candidates = {name: tensor for name, _, _, tensor in _tensors(other)}
        for name, owner, key, tensor in list(_tensors(backbone)):
            candidate = candidates.get(name)
            if candidate is None or not _equal(tensor, candidate):
                continue
            shared += tensor.numel() * tensor.element_size()
            if tensor is not candidate:
                setattr(owner, key, candidate)
    return shared


def _equal(tensor: Tensor, other: Tensor) -> bool:
    comparable = (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
    return comparable and (tensor is other or torch.equal(tensor, other))


def _tensors(backbone: Backbone) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield every parameter and buffer: full name, owning module, name in the module, tensor."""
    for prefix, module in backbone.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    yield f"{prefix}.{key}", module, key, tensor
