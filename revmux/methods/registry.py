"""Methods, found by name; a user's own package registers its methods the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from revmux.errors import UserError, one_of
from revmux.methods.base import BackboneShape, Method
from revmux.utils.plugins import load_plugins
from revmux.utils.type_check import check_types

ENTRY_POINTS = "revmux.methods"
"""Group of entry points by which a package names the modules of its methods."""

_METHODS: dict[str, type[Method]] = {}
MethodClass = TypeVar("MethodClass", bound=type[Method])


def register_method(method: MethodClass) -> MethodClass:
    """Class decorator: make the method available under its ``name``."""
    _METHODS[method.name] = method
    return method


def method_names() -> list[str]:
    """Every registered method, those of installed packages too."""
    load_plugins(ENTRY_POINTS)
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        UserError: no such method, with the list of known ones.
    """
    load_plugins(ENTRY_POINTS)
    if name not in _METHODS:
        raise one_of("method", name, method_names(), "docs/add-a-method.md shows how to add one")
    return _METHODS[name]


def build_method(name: str, shape: BackboneShape, num_inputs: int, options: Mapping[str, Any] | None = None) -> Method:
    """A method with fresh weights.

    Args:
        name: registered name, such as ``"revmux"``.
        shape: the backbone's shape.
        num_inputs: N.
        options: settings of the method by name; missing ones take their defaults.

    Raises:
        UserError: an unknown name or option, an option of another type, or an N that the method or the width cannot serve.
    """
    cls = method_class(name)
    try:
        settings = cls.Options(**dict(options or {}))
    except TypeError as error:
        legal = list(getattr(cls.Options, "__dataclass_fields__", {}))
        raise UserError(
            f"options {dict(options or {})} of {name}: {error}; known options: {', '.join(legal) or 'none'}"
        ) from None
    check_types(cls.Options, dict(options or {}), f"options of {name}")
    return cls(shape, num_inputs, settings)
