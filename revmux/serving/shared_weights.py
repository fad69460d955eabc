"""Keep one copy in memory of the weights that several task models have in common."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import ref

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone

_SAMPLES = 16
"""Values of a tensor that decide which others it is compared with."""


class WeightPool:
    """The tensors of the frozen backbones that are in use.

    Two prompts on one language model share all weights. Task models that were tuned only in their upper layers share the
    lower ones.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[ref[Tensor]]] = {}
        self._clean_at = 1000

    def share(self, backbone: Backbone) -> int:
        """Replace tensors of a backbone by those of earlier ones that have the same name and equal values.

        The earlier backbones remain unchanged. Their number has hardly any effect on the time.

        Args:
            backbone: frozen, and on its device. Later backbones can share the tensors that no earlier one has.

        Returns:
            Number of bytes of the backbone that are shared.
        """
        self._clean()
        shared = 0
        for name, owner, key, tensor in list(_tensors(backbone)):
            known = self._known.setdefault(_key(name, tensor), [])
            found = [candidate for each in known if (candidate := each()) is not None]
            same = next((candidate for candidate in found if candidate is tensor), None)
            if same is None:
                same = next((candidate for candidate in found if _equal(tensor, candidate)), None)
            if same is None:
                known.append(ref(tensor))
                continue
            shared += tensor.numel() * tensor.element_size()
            if same is not tensor:
                setattr(owner, key, same)
        return shared

    def _clean(self) -> None:
        """Forget the tensors of removed backbones, once there can be as many of them as of the others."""
        if len(self._known) < self._clean_at:
            return
        alive = {key: [each for each in known if each() is not None] for key, known in self._known.items()}
        self._known = {key: known for key, known in alive.items() if known}
        self._clean_at = 1000 + 2 * len(self._known)


def _key(name: str, tensor: Tensor) -> int:
    """A number that equal tensors have in common, and hardly any different ones."""
    step = max(1, tensor.numel() // _SAMPLES)
    return hash((name, tensor.shape, repr(tensor.detach().flatten()[::step].tolist())))


def _equal(tensor: Tensor, other: Tensor) -> bool:
    comparable = (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
    return comparable and torch.equal(tensor, other)


def _tensors(backbone: Backbone) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield every parameter and buffer: full name, owning module, name in the module, tensor."""
    for prefix, module in backbone.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    yield f"{prefix}.{key}", module, key, tensor
