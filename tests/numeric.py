"""Closeness of values that different kernels or shapes computed, whatever the processor.

Two ways to compute the same numbers differ by rounding: another processor, another thread count or another shape
sums in another order. The error grows with the precision of the type, with the size of the values and with the
number of layers between the input and the value, so the tolerance here follows all three. Values that the same
kernels computed on the same shapes are compared with ``torch.equal`` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

LAYERS = 4
"""Layers of the tiny models of these tests."""

STEPS_PER_LAYER = 256
"""Rounding errors, in units of the type's precision, that one layer may add: the weights here are large."""

HALF_STEPS_PER_LAYER = 4
"""The same for two-byte types, in which results are rounded but sums are accumulated in float32."""


def relative_tolerance(*tensors: Tensor, layers: int = LAYERS) -> float:
    """Return the rounding error expected of ``layers`` layers, relative to the largest value.

    Args:
        tensors: the compared tensors; the coarsest type counts.
        layers: layers between the input and the values.
    """
    types = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    rounding = [
        (HALF_STEPS_PER_LAYER if dtype.itemsize == 2 else STEPS_PER_LAYER) * torch.finfo(dtype).eps for dtype in types
    ]
    return (layers + 1) * max(rounding, default=0.0)


def assert_close(
    actual: Tensor | Sequence[Tensor],
    expected: Tensor | Sequence[Tensor],
    *,
    layers: int = LAYERS,
    size: float = 0.0,
    message: str | None = None,
) -> None:
    """Fail if two computations of the same values differ by more than rounding.

    Args:
        actual: a tensor, or a sequence of tensors that is compared item by item.
        expected: the expected values, with the same structure.
        layers: layers between the input and the values.
        size: largest intermediate value, if the compared values are small differences of large ones.
        message: shown in place of the report of the differences.
    """
    if not isinstance(actual, Tensor):
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, layers=layers, size=size, message=message)
        return
    assert isinstance(expected, Tensor)
    relative = relative_tolerance(actual, expected, layers=layers)
    largest = max([size, *(float(tensor.detach().abs().max()) for tensor in (actual, expected) if tensor.numel())])
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * largest, msg=message)


def approx(expected: float | list[float] | dict[str, float], layers: int = LAYERS) -> Any:
    """``pytest.approx`` for Python numbers that were computed in float32."""
    return pytest.approx(expected, rel=relative_tolerance(torch.empty(0), layers=layers))
