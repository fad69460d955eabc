"""Running a model on tensors that have shapes but no values: nothing is allocated, nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)


VALUE_QUESTIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
"""Operations that ask for values, such as «no padding?» or «positions in order?»."""


class _AssumeTrue(TorchDispatchMode):
    """Questions about values are answered yes, as for full-length inputs."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in VALUE_QUESTIONS:
            return True
        return function(*args, **(kwargs or {}))


@contextmanager
def valueless() -> Iterator[None]:
    """Tensors made inside have a shape, a type and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), _AssumeTrue():  # type: ignore[no-untyped-call]  # unannotated in torch
        yield


def call_valueless(module: nn.Module, function: Callable[[], Result], dtype: torch.dtype | None = None) -> Result:
    """``function()`` while the module's weights have no values; to be called inside :func:`valueless`.

    Args:
        module: on any device, meta included; its own weights are back in place afterwards.
        function: what to run; it may use the module in any way.
        dtype: type of the floating-point weights meanwhile; None keeps each its own.
    """

    def stand_in(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device="cpu").requires_grad_(tensor.requires_grad)

    tensors = chain(module.named_parameters(), module.named_buffers())
    weights = {f"module.{name}": stand_in(tensor) for name, tensor in tensors}
    result: Result = functional_call(_Holder(module, function), weights)
    return result


def weightless(module: Module) -> Module:
    """A copy without weights, so that the module itself may run in another thread meanwhile.

    Returns:
        The same modules with every parameter and buffer on the meta device.
    """
    standing_in: dict[int, Any] = {}
    for parameter in module.parameters():
        standing_in[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        standing_in[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, standing_in)


class _Holder(nn.Module):
    """Gives a plain function the form that ``functional_call`` takes."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> Any:
        return self.function()
