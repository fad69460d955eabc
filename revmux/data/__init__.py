"""Labelled text, and the tokens made of it."""

from revmux.data.sources import DataConfig, TaskData, load_task
from revmux.data.tokens import TokenizedSplit

__all__ = ["DataConfig", "TaskData", "TokenizedSplit", "load_task"]
