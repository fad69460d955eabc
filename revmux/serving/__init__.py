"""Answer live requests in groups: a queue that the model pulls from, and group widths chosen by the queue's depth."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from revmux.errors import EmptyText, TextError
    from revmux.labels import rank_labels
    from revmux.serving.answer import Answer
    from revmux.serving.engine import Engine
    from revmux.serving.errors import Draining, Expired, InferenceFailed, Overloaded, UnknownTask
    from revmux.serving.limits import Limits
    from revmux.serving.metrics import PassReport
    from revmux.serving.task import Task
else:
    from revmux.utils.lazy import lazy_attributes

    __getattr__ = lazy_attributes(
        __name__,
        {
            "revmux.errors": ["EmptyText", "TextError"],
            "revmux.labels": ["rank_labels"],
            "revmux.serving.answer": ["Answer"],
            "revmux.serving.engine": ["Engine"],
            "revmux.serving.errors": ["Draining", "Expired", "InferenceFailed", "Overloaded", "UnknownTask"],
            "revmux.serving.limits": ["Limits"],
            "revmux.serving.metrics": ["PassReport"],
            "revmux.serving.task": ["Task"],
        },
    )
