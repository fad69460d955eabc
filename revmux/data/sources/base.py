"""The interface of a data source, and the choice of the source for ``--data.source``.

The first registered source that claims the value of ``--data.source`` reads it. The hub claims every name, so it is
tried last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from datasets import Dataset

from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.utils.registry import Registry


class Source(ABC):
    """One kind of source of labelled text.

    Attributes:
        is_last_resort: whether all other sources are tried first.
    """

    is_last_resort: ClassVar[bool] = False

    @abstractmethod
    def claims(self, source: str) -> bool:
        """Whether this source can read ``--data.source SOURCE``. This does not read the data."""

    @abstractmethod
    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits by name: ``all``, or ``train`` with ``dev``, ``validation`` or ``test``.

        A source that provides ``selection`` as well splits the data itself.

        Raises:
            UserError: the data cannot be found or read.
        """

    def name(self, config: DataConfig) -> str:
        """The name under which logs and artifacts record the data."""
        return config.source

    def identity(self) -> dict[str, Any]:
        """Everything besides the settings that determines the content, for the task's identity."""
        return {}


SOURCES: Registry[type[Source]] = Registry(
    "data source", "revmux.data_sources", "name a file, a folder or a hub data set"
)


def source_of(config: DataConfig) -> Source:
    """The first registered source that claims ``config.source``.

    Raises:
        UserError: no source claims it.
    """
    for source in sorted((kind() for kind in SOURCES), key=lambda source: source.is_last_resort):
        if source.claims(config.source):
            return source
    raise UserError(
        f"no data source reads {config.source!r}; registered: {', '.join(SOURCES.names())}; name data that one of these reads"
    )
