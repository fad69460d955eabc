"""Labelled text and its tokens."""

from typing import TYPE_CHECKING

__all__ = ["DataConfig", "TaskData", "TokenizedSplit", "load_task"]

if TYPE_CHECKING:
    from revmux.data.config import DataConfig
    from revmux.data.task import TaskData, load_task
    from revmux.data.tokens import TokenizedSplit
else:
    from revmux.utils.lazy import lazy_attributes

    __getattr__ = lazy_attributes(
        __name__,
        {
            "revmux.data.config": ["DataConfig"],
            "revmux.data.task": ["TaskData", "load_task"],
            "revmux.data.tokens": ["TokenizedSplit"],
        },
    )
