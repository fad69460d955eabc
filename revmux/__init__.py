"""RevMUX: several inputs share one pass through the upper layers of a frozen classifier."""

from revmux.backbone import Backbone, HiddenState, cut
from revmux.errors import UserError
from revmux.methods import BackboneShape, Method, build_method
from revmux.model import MultiplexedClassifier

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "BackboneShape",
    "HiddenState",
    "Method",
    "MultiplexedClassifier",
    "UserError",
    "build_method",
    "cut",
]
