"""Backbone families, found by ``config.model_type``."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from revmux.backbone.base import Backbone
from revmux.backbone.generative import GenerativeBackbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.errors import UserError
from revmux.utils.registry import Registry

BACKBONES: Registry[type[Backbone]] = Registry(
    "architecture", "revmux.backbones", "docs/add-a-backbone.md shows how to add one"
)
Family = TypeVar("Family", bound=type[Backbone])


def register_backbone(family: Family) -> Family:
    """Class decorator: serve the family's ``model_types``."""
    BACKBONES.register(*family.model_types)(family)
    return family


def supported_model_types() -> list[str]:
    """Every ``model_type`` that can be cut, including those of installed packages."""
    return BACKBONES.names()


def generative_model_types() -> list[str]:
    """Those of :func:`supported_model_types` that can answer by label words."""
    return [name for name in supported_model_types() if issubclass(BACKBONES[name], GenerativeBackbone)]


def cut(model: nn.Module, verbalizer: Verbalizer | None = None) -> Backbone:
    """Wrap a Hugging Face model so that it can be run in parts; its weights are shared, not copied.

    Args:
        model: a sequence classifier, or a language model if a verbalizer is given.
        verbalizer: the tokens of each class, which are scored through the output embedding.

    Raises:
        UserError: no family serves the model's ``model_type``, or the model does not have the required head.
    """
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if model_type not in BACKBONES:
        raise unsupported(model_type)
    family = BACKBONES[model_type]
    if verbalizer is None:
        return family(model)
    if not issubclass(family, GenerativeBackbone):
        raise UserError(
            f"{model_type} is not a language model, so a verbalizer cannot score its words; leave the verbalizer out, "
            f"or choose from {', '.join(generative_model_types())}"
        )
    return family(model, verbalizer)


def unsupported(model_type: str, model: str = "") -> UserError:
    """The error for an architecture that no family serves.

    Args:
        model_type: from the model's configuration.
        model: name of the model, for the message.
    """
    return UserError(
        f"{model + ': ' if model else ''}unsupported architecture {model_type!r}; supported: "
        f"{', '.join(supported_model_types())}; {BACKBONES.remedy}"
    )
