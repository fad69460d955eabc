"""The registry of methods by name. Other packages register their methods in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from revmux.errors import UserError
from revmux.methods.base import BackboneShape, Method
from revmux.utils.registry import Registry
from revmux.utils.type_check import check_types

METHODS: Registry[type[Method]] = Registry("method", "revmux.methods", "docs/add-a-method.md shows how to add one")
MethodClass = TypeVar("MethodClass", bound=type[Method])


def register_method(method: MethodClass) -> MethodClass:
    """Class decorator: make the method available under its ``name``."""
    METHODS.register(method.name)(method)
    return method


def method_names() -> list[str]:
    """The names of all registered methods, including those of installed packages."""
    return METHODS.names()


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        UserError: the name is unknown; the message lists the registered names.
    """
    return METHODS[name]


def build_method(name: str, shape: BackboneShape, num_inputs: int, options: Mapping[str, Any] | None = None) -> Method:
    """Build a method with newly initialized weights.

    Args:
        name: registered name, such as ``"revmux"``.
        shape: the backbone's shape.
        num_inputs: N.
        options: settings of the method by name. Missing settings have their defaults.

    Raises:
        UserError: an unknown name or option, an option of the wrong type, or an N that the method or the hidden size
            does not allow.
    """
    cls = method_class(name)
    try:
        settings = cls.Options(**dict(options or {}))
    except TypeError as error:
        valid = list(getattr(cls.Options, "__dataclass_fields__", {}))
        raise UserError(
            f"options {dict(options or {})} of {name}: {error}; known options: {', '.join(valid) or 'none'}"
        ) from None
    check_types(cls.Options, dict(options or {}), f"options of {name}")
    return cls(shape, num_inputs, settings)
