"""A frozen backbone cut at layer l, one file per family."""

from revmux.backbone import bart as bart
from revmux.backbone import bert as bert
from revmux.backbone import deberta_v2 as deberta_v2
from revmux.backbone import distilbert as distilbert
from revmux.backbone import electra as electra
from revmux.backbone import gpt2 as gpt2
from revmux.backbone import llama as llama
from revmux.backbone import modernbert as modernbert
from revmux.backbone import roberta as roberta
from revmux.backbone import t5 as t5
from revmux.backbone.base import Backbone
from revmux.backbone.registry import cut, generative_model_types, register_backbone, supported_model_types
from revmux.backbone.state import HiddenState, TokenBatch
from revmux.backbone.verbalizer import Verbalizer

__all__ = [
    "Backbone",
    "HiddenState",
    "TokenBatch",
    "Verbalizer",
    "cut",
    "generative_model_types",
    "register_backbone",
    "supported_model_types",
]
