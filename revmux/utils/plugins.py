"""Methods, backbone families and data sources of other packages, found through their entry points."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

_loaded: set[str] = set()


def load_plugins(group: str) -> None:
    """Import every module that installed packages declare under an entry point group, once per process.

    Each module registers its own entries. A module that cannot be imported causes a warning, not an error.

    Args:
        group: ``revmux.methods``, ``revmux.backbones`` or ``revmux.data_sources``.
    """
    if group in _loaded:
        return
    _loaded.add(group)  # before the imports, since a module may list the names while it is imported
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "a package"
            warnings.warn(
                f"{group}: {entry.value} of {package} cannot be loaded ({type(error).__name__}: {error}); "
                "fix or uninstall that package",
                stacklevel=2,
            )


def has_plugins(group: str) -> bool:
    """Whether an installed package declares modules under an entry point group. None of them is imported.

    Args:
        group: see :func:`load_plugins`.
    """
    return bool(entry_points(group=group))
