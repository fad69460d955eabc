"""Live requests in groups: a queue that the model pulls from, group widths chosen by what waits, answers by futures."""

from revmux.errors import EmptyText, TextError
from revmux.labels import rank_labels
from revmux.serving.answer import Answer
from revmux.serving.engine import Engine
from revmux.serving.errors import Draining, Expired, InferenceFailed, Overloaded, UnknownTask
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
