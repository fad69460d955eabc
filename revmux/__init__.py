"""RevMUX: multiplexed inference, where several inputs share one pass through the upper layers of a frozen classifier.

Every public name is imported on first use, so that ``import revmux`` imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from revmux.errors import UserError
from revmux.version import __version__

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneShape",
    "BulkConfig",
    "DataConfig",
    "Goal",
    "HiddenState",
    "Method",
    "MultiplexedClassifier",
    "Recipe",
    "TextClassifier",
    "UserError",
    "__version__",
    "build_method",
    "classify_files",
    "cut",
    "load_adapter",
    "load_pretrained",
    "load_task",
    "plan_here",
    "save_adapter",
]

if TYPE_CHECKING:
    from revmux.adapters.classifier import TextClassifier
    from revmux.adapters.folder import load_adapter, save_adapter
    from revmux.backbone import Backbone, HiddenState, cut
    from revmux.bulk.classify import classify_files
    from revmux.bulk.config import BulkConfig
    from revmux.data.config import DataConfig
    from revmux.data.task import load_task
    from revmux.methods import BackboneShape, Method, build_method
    from revmux.model import MultiplexedClassifier
    from revmux.plan.build import plan_here
    from revmux.plan.config import Goal
    from revmux.pretrained.config import BackboneConfig
    from revmux.pretrained.loading import load_pretrained
    from revmux.training.config import Recipe
else:
    from revmux.utils.lazy import lazy_attributes

    __getattr__ = lazy_attributes(
        __name__,
        {
            "revmux.adapters.classifier": ["TextClassifier"],
            "revmux.adapters.folder": ["load_adapter", "save_adapter"],
            "revmux.backbone": ["Backbone", "HiddenState", "cut"],
            "revmux.bulk.classify": ["classify_files"],
            "revmux.bulk.config": ["BulkConfig"],
            "revmux.data.config": ["DataConfig"],
            "revmux.data.task": ["load_task"],
            "revmux.methods": ["BackboneShape", "Method", "build_method"],
            "revmux.model": ["MultiplexedClassifier"],
            "revmux.plan.build": ["plan_here"],
            "revmux.plan.config": ["Goal"],
            "revmux.pretrained.config": ["BackboneConfig"],
            "revmux.pretrained.loading": ["load_pretrained"],
            "revmux.training.config": ["Recipe"],
        },
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
