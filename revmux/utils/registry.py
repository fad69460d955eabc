"""Registries of classes by name. Installed packages add entries through entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from revmux.errors import one_of
from revmux.utils.plugins import load_plugins

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, for methods, backbone families and data sources.

    Args:
        kind: what an entry is called in error messages, such as ``"method"``.
        entry_points: entry point group in which packages declare the modules that register their entries.
        remedy: last part of the error message for an unknown name.
    """

    def __init__(self, kind: str, entry_points: str, remedy: str) -> None:
        self.kind = kind
        self.entry_points = entry_points
        self.remedy = remedy
        self._entries: dict[str, Entry] = {}

    def register(self, *names: str) -> Callable[[Entry], Entry]:
        """Decorator that adds an entry under one or more names."""

        def add(entry: Entry) -> Entry:
            self._entries.update(dict.fromkeys(names, entry))
            return entry

        return add

    def names(self) -> list[str]:
        """All registered names, sorted, including those of installed packages."""
        load_plugins(self.entry_points)
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        load_plugins(self.entry_points)
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        """The entries in registration order. An entry with several names occurs once."""
        load_plugins(self.entry_points)
        return iter(dict.fromkeys(self._entries.values()))

    def __getitem__(self, name: str) -> Entry:
        """The entry under ``name``.

        Raises:
            UserError: the name is unknown; the message lists the registered names.
        """
        if name not in self:
            raise one_of(self.kind, name, self.names(), self.remedy)
        return self._entries[name]
