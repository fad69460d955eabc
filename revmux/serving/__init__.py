"""Live requests in groups: a queue that the model pulls from, group widths chosen by what waits, answers by futures."""

from revmux.serving.answer import Answer, rank_labels
from revmux.serving.engine import Engine
from revmux.serving.errors import Draining, EmptyText, Expired, InferenceFailed, Overloaded, TextError, UnknownTask
from revmux.serving.limits import Limits
from revmux.serving.metrics import PassReport
from revmux.serving.task import Task

__all__ = [
    "Answer",
    "Draining",
    "EmptyText",
    "Engine",
    "Expired",
    "InferenceFailed",
    "Limits",
    "Overloaded",
    "PassReport",
    "Task",
    "TextError",
    "UnknownTask",
    "rank_labels",
]
