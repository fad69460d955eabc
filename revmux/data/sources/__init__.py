"""Sources of labelled text, one file per kind of source."""

from revmux.data.sources import docstrings as docstrings
from revmux.data.sources import embedded as embedded
from revmux.data.sources import files as files
from revmux.data.sources import hub as hub
from revmux.data.sources import sentiment as sentiment
from revmux.data.sources.base import SOURCES, Source, source_of

__all__ = ["SOURCES", "Source", "source_of"]
