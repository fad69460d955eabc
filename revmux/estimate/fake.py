"""Running a model on fake tensors, which have shapes but no values: nothing is allocated or computed."""

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


VALUE_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
"""Operations that read values, by which models check for padding or for positions that are out of order."""


class AssumeTrue(TorchDispatchMode):
    """Answers every check of values with True, as for inputs without padding, where tensors have no values."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in VALUE_READS:
            return True
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Create all tensors as fake tensors, with a shape and a type but no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), AssumeTrue():  # type: ignore[no-untyped-call]  # unannotated in torch
        yield


def call_with_fake_weights(
    module: nn.Module, function: Callable[[], Result], dtype: torch.dtype | None = None
) -> Result:
    """Call a function while the module's weights are fake tensors; must be called inside :func:`fake_tensors`.

    Args:
        module: on any device, meta included; its own weights are restored afterwards.
        function: the function to call; it may use the module in any way.
        dtype: type of the floating-point weights during the call; None keeps the type of each.
    """

    def fake(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device="cpu").requires_grad_(tensor.requires_grad)

    tensors = chain(module.named_parameters(), module.named_buffers())
    weights = {f"module.{name}": fake(tensor) for name, tensor in tensors}
    result: Result = functional_call(_FunctionModule(module, function), weights)
    return result


def meta_copy(module: Module) -> Module:
    """A copy of a module on the meta device; meanwhile the original may run in another thread.

    Returns:
        A copy with every parameter and buffer on the meta device.
    """
    replacements: dict[int, Any] = {}
    for parameter in module.parameters():
        replacements[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        replacements[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, replacements)


class _FunctionModule(nn.Module):
    """Wraps a function as a module, as ``functional_call`` requires."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> Any:
        return self.function()
