"""The route of an adapter and its counted cost, which is the same for all tasks of one architecture."""

from __future__ import annotations

from itertools import chain

from revmux.backbone.decoder import DecoderBackbone
from revmux.estimate.flops import count_flops, plain_cost
from revmux.model import MultiplexedClassifier
from revmux.serving.architecture import architecture_of
from revmux.serving.scheduling import Route

COUNTED_LENGTH = 64
"""Tokens per input for which costs are counted. Costs relative to the plain model hardly depend on it."""

_counted: dict[int, Route] = {}
"""The routes of this process by what they depend on. Counting one takes longer than loading a small task."""


def route_of(model: MultiplexedClassifier) -> Route:
    """The width and the counted cost of an adapter on its backbone, which is counted once per architecture."""
    key = _dependencies(model)
    found = _counted.get(key)
    if found is None:
        found = _counted[key] = _count(model)
    return found


def _dependencies(model: MultiplexedClassifier) -> int:
    """A number that models have in common if their operations are the same."""
    backbone, method = model.backbone, model.method
    tensors = chain(backbone.named_parameters(), backbone.named_buffers(), method.named_parameters())
    shapes = tuple((name, tensor.shape) for name, tensor in tensors)
    constant = len(backbone.constant_tokens) if isinstance(backbone, DecoderBackbone) else 0
    settings = type(method), method.num_inputs, repr(method.options), model.prefill_layers
    return hash((architecture_of(backbone), shapes, constant, settings))


def _count(model: MultiplexedClassifier) -> Route:
    backbone, method, width = model.backbone, model.method, model.num_inputs
    length = min(COUNTED_LENGTH, backbone.max_length - method.added_tokens)
    plain = plain_cost(backbone, length).per_input
    cost = count_flops(backbone, method, model.prefill_layers, length)
    if method.prepares_tokens:  # the tokens differ per slot, so filling slots with repeated inputs saves nothing
        return Route(width, f"slots of {width}", 0.0, width * cost.per_input / plain, method.name)
    shared = width * (cost.per_input - cost.prefill)
    return Route(width, f"layer {model.prefill_layers}", cost.prefill / plain, shared / plain, method.name)
