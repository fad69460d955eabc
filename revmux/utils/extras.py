"""Imports of optional packages. If one is missing, the error names the pip command that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from revmux.errors import UserError


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an error that names the extra of revmux that installs it.

    Args:
        module: dotted name to import, such as ``"matplotlib"``.
        extra: name of the extra in ``pyproject.toml`` that installs it.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(f"{module} is not installed; run: pip install 'revmux[{extra}]'")
    return importlib.import_module(module)
