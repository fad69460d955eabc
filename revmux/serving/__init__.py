"""Live requests in groups: a queue that the model pulls from, group widths chosen by what waits, answers by futures."""

from revmux.serving.answer import Answer, rank_labels
from revmux.serving.engine import Engine
from revmux.serving.errors import Draining, EmptyText, InferenceFailed, Overloaded, TextError
from revmux.serving.limits import Limits

__all__ = [
    "Answer",
    "Draining",
    "EmptyText",
    "Engine",
    "InferenceFailed",
    "Limits",
    "Overloaded",
    "TextError",
    "rank_labels",
]
