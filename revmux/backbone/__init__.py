"""A frozen backbone cut at layer l, one file a family."""

from revmux.backbone import bert as bert
from revmux.backbone.base import Backbone
from revmux.backbone.registry import cut, register_backbone, supported_model_types
from revmux.backbone.state import HiddenState, TokenBatch

__all__ = ["Backbone", "HiddenState", "TokenBatch", "cut", "register_backbone", "supported_model_types"]
