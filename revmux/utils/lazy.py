"""Public names of a package, imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_attributes(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562), which imports the module of a name on first use.

    Args:
        package: ``__name__`` of the package.
        modules: for each module, the names that the package offers from it.

    Returns:
        The function to bind to ``__getattr__``.
    """
    origin = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origin[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
