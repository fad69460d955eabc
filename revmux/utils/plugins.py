"""Methods and backbone families of other packages, found by the entry points that those declare."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

_loaded: set[str] = set()


def load_plugins(group: str) -> None:
    """Import, once a process, every module that an installed package names under an entry point group.

    The modules register what they bring. One that cannot be imported is warned of, since the others still serve.

    Args:
        group: ``revmux.methods`` or ``revmux.backbones``.
    """
    if group in _loaded:
        return
    _loaded.add(group)  # first, since a module that is being imported may ask for names itself
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "a package"
            warnings.warn(
                f"{group}: {entry.value} of {package} cannot be loaded ({type(error).__name__}: {error}); "
                "mend or uninstall that package",
                stacklevel=2,
            )
