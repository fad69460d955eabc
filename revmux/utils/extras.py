"""Imports of optional packages. If one is missing, the error names the pip command that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from revmux.errors import UserError

EXTRAS = {
    "train": ("ray",),
    "tune": ("ray", "optuna"),
    "serve": ("ray", "fastapi", "prometheus_client", "fastapi_offline"),
    "mlflow": ("mlflow",),
    "report": ("matplotlib", "plotly"),
    "plan": ("scipy",),
    "tour": ("requests", "rich"),
    "gguf": ("gguf", "accelerate"),
    "peft": ("peft",),
}
"""The modules that each extra of revmux brings, as far as its absence is noticed by them."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an error that names the extra of revmux that installs it.

    Args:
        module: dotted name to import, such as ``"matplotlib"``.
        extra: name of the extra in ``pyproject.toml`` that installs it.

    Raises:
        UserError: the package is not installed.
    """
    if not _is_installed(module):
        raise UserError(f"{module} is not installed; run: pip install 'revmux[{extra}]'")
    return importlib.import_module(module)


def check_extras(*extras: str) -> None:
    """Refuse to start where an optional package is missing. Nothing is imported.

    Args:
        extras: names of extras, keys of :data:`EXTRAS`.

    Raises:
        UserError: naming the missing packages and the one pip command that installs them all.
    """
    missing = {extra: [name for name in EXTRAS[extra] if not _is_installed(name)] for extra in extras}
    lacking = [extra for extra, names in missing.items() if names]
    if lacking:
        names = list(dict.fromkeys(name for extra in lacking for name in missing[extra]))
        verb = "is" if len(names) == 1 else "are"
        raise UserError(f"{', '.join(names)} {verb} not installed; run: pip install 'revmux[{','.join(lacking)}]'")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None
