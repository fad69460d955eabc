"""RevMUX: several inputs share one pass through the upper layers of a frozen classifier."""

from revmux.backbone import Backbone, HiddenState, cut
from revmux.errors import UserError
from revmux.methods import BackboneShape, Method, build_method
from revmux.model import MultiplexedClassifier
from revmux.version import __version__

__all__ = [
    "Backbone",
    "BackboneShape",
    "HiddenState",
    "Method",
    "MultiplexedClassifier",
    "UserError",
    "__version__",
    "build_method",
    "cut",
]
