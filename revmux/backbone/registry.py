"""Families of backbone, found by ``config.model_type``."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from revmux.backbone.base import Backbone
from revmux.errors import UserError

_FAMILIES: dict[str, type[Backbone]] = {}
Family = TypeVar("Family", bound=type[Backbone])


def register_backbone(family: Family) -> Family:
    """Class decorator: serve the family's ``model_types``."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
    return family


def supported_model_types() -> list[str]:
    """Every ``model_type`` that can be cut."""
    return sorted(_FAMILIES)


def cut(model: nn.Module) -> Backbone:
    """Wrap a Hugging Face model so that it can be run in parts; its weights are shared, not copied.

    Raises:
        UserError: no family serves the model's ``model_type``.
    """
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if model_type not in _FAMILIES:
        raise UserError(
            f"unsupported architecture {model_type!r}; supported: {', '.join(supported_model_types())}; "
            "docs/add-a-backbone.md shows how to add one"
        )
    return _FAMILIES[model_type](model)
