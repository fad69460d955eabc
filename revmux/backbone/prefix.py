"""The constant prefix of causal models: what every input begins with runs once, and each layer keeps its keys and values.

In classification by prompt, the beginning of the template (and a soft prompt) is the same in every input. In a causal
model, a token's state depends only on the tokens before it, so the states of these tokens are the same in every pass::

    keys, values of layer i  =  [those of the constant tokens, computed once ; those of this input]

The same holds above the cut: all N inputs of a group have the same states at a constant position, so their mixture is
one constant too, for each adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revmux.backbone.state import Prefix
from revmux.utils.autocast import without_autocast


class PastKeys:
    """Keys and values of a prefix, as ``past_key_values`` of a layer of Transformers.

    Unlike a cache for generation it keeps nothing, so a layer may run several times (gradient checkpointing).
    """

    def __init__(self, prefix: Prefix) -> None:
        self.layers = prefix.layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put the prefix before the keys and values of an input: (B, H, S, d/H) to (B, H, P + S, d/H)."""
        # Under autocast the keys of an input are narrower than those of the prefix.
        first = [kept.to(own.dtype) for kept, own in zip(self.layers[layer_idx], (keys, values), strict=True)]
        rows = (len(keys), -1, -1, -1)
        return torch.cat([first[0].expand(rows), keys], dim=2), torch.cat([first[1].expand(rows), values], dim=2)


class KeyRecorder:
    """Records the keys and values of the layers that run with it as ``past_key_values``.

    Attributes:
        layers: keys and values of each layer, each (1, H, P, d/H).
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values, and return them unchanged."""
        self.layers[layer_idx] = (keys, values)
        return keys, values


@dataclass(frozen=True, eq=False)
class KeptPrefix:
    """A computed prefix, and the weights that it was computed with. A copy of a model computes its own.

    Attributes:
        prefix: the prefix.
        weights: each weight, with its version and place at that time.
    """

    prefix: Prefix
    weights: tuple[tuple[Tensor, int, torch.device, torch.dtype], ...]

    @classmethod
    def of(cls, prefix: Prefix, weights: Iterable[Tensor]) -> KeptPrefix:
        """Keep a prefix that was computed with these weights."""
        return cls(prefix, tuple((weight, _version(weight), weight.device, weight.dtype) for weight in weights))

    def is_current(self, weights: Iterable[Tensor]) -> bool:
        """Whether these are the weights that the prefix was computed with, unchanged."""
        found = [(weight, _version(weight), weight.device, weight.dtype) for weight in weights]
        return len(found) == len(self.weights) and all(
            one is other and one_rest == other_rest
            for (one, *one_rest), (other, *other_rest) in zip(found, self.weights, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptPrefix:
        return self  # it never changes, and the copy's own weights are others


@contextmanager
def kept_exactly(device: torch.device) -> Iterator[None]:
    """Compute what is kept in the weights' own precision, as tensors that training can use, whatever runs around it."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
        yield


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
