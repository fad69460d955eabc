"""Families of backbone, found by ``config.model_type``."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from revmux.backbone.base import Backbone
from revmux.backbone.generative import GenerativeBackbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.errors import UserError
from revmux.utils.plugins import load_plugins

ENTRY_POINTS = "revmux.backbones"
"""Group of entry points by which a package names the modules of its families."""

_FAMILIES: dict[str, type[Backbone]] = {}
Family = TypeVar("Family", bound=type[Backbone])


def register_backbone(family: Family) -> Family:
    """Class decorator: serve the family's ``model_types``."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def supported_model_types() -> list[str]:
    """Every ``model_type`` that can be cut, those of installed packages too."""
    load_plugins(ENTRY_POINTS)
    return sorted(_FAMILIES)


def generative_model_types() -> list[str]:
    """Those of :func:`supported_model_types` that can answer by label words."""
    return [name for name in supported_model_types() if issubclass(_FAMILIES[name], GenerativeBackbone)]


def cut(model: nn.Module, verbalizer: Verbalizer | None = None) -> Backbone:
    """Wrap a Hugging Face model so that it can be run in parts; its weights are shared, not copied.

    Args:
        model: a sequence classifier, or a language model where a verbalizer is given.
        verbalizer: the tokens that stand for each class, to score them through the output embedding.

    Raises:
        UserError: no family serves the model's ``model_type``, or the model has not the head asked for.
    """
    load_plugins(ENTRY_POINTS)
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if model_type not in _FAMILIES:
        raise UserError(
            f"unsupported architecture {model_type!r}; supported: {', '.join(supported_model_types())}; "
            "docs/add-a-backbone.md shows how to add one"
        )
    family = _FAMILIES[model_type]
    if verbalizer is None:
        return family(model)
    if not issubclass(family, GenerativeBackbone):
        raise UserError(
            f"{model_type} generates no text, so a verbalizer cannot score it; leave the verbalizer out, "
            f"or choose from {', '.join(generative_model_types())}"
        )
    return family(model, verbalizer)
