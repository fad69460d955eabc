"""Labelled text and its tokens."""

from revmux.data.config import DataConfig
from revmux.data.task import TaskData, load_task
from revmux.data.tokens import TokenizedSplit

__all__ = ["DataConfig", "TaskData", "TokenizedSplit", "load_task"]
