"""Named recipes: optimizer, loss and options per method as YAML, one file per recipe. This module imports nothing heavy.

``paper`` is the paper's plain form. ``strong`` is the default of the jobs. A path to a YAML file of the same form names a
recipe of the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from revmux.errors import UserError, one_of
from revmux.training.config import LossConfig, OptimConfig

DEFAULT_RECIPE = "strong"
_PARTS = ("optim", "loss", "options")


@dataclass(frozen=True)
class NamedRecipe:
    """The reusable part of a :class:`revmux.training.config.Recipe`.

    Attributes:
        name: name or path of the recipe.
        optim: settings of the optimizer that differ from their defaults.
        loss: settings of the loss that differ from their defaults.
        options: settings per method name.
    """

    name: str
    optim: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def optim_config(self, **given: Any) -> OptimConfig:
        """The optimizer's settings; keyword arguments take precedence."""
        return OptimConfig(**{**self.optim, **given})

    def loss_config(self, **given: Any) -> LossConfig:
        """The loss; keyword arguments take precedence."""
        return LossConfig(**{**self.loss, **given})

    def options_of(self, method: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The options of a method; those given take precedence."""
        return {**self.options.get(method, {}), **(given or {})}


def recipe_names() -> list[str]:
    """The names of the recipes that are included in this package."""
    files = resources.files("revmux.training.recipes").iterdir()
    return sorted(item.name.removesuffix(".yaml") for item in files if item.name.endswith(".yaml"))


@cache
def named_recipe(name: str = DEFAULT_RECIPE) -> NamedRecipe:
    """Load an included recipe by name, or a YAML file by path.

    Raises:
        UserError: no such recipe, or a file with an unknown key or value.
    """
    if name in recipe_names():
        text = resources.files("revmux.training.recipes").joinpath(f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise one_of("recipe", name, recipe_names(), "choose one of these, or the path of a YAML file")
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name!r} is not valid YAML ({str(error).splitlines()[0]}); correct the file") from None
    if not isinstance(raw, dict) or not all(isinstance(part, dict) for part in raw.values()):
        raise UserError(
            f"recipe {name!r} is not a mapping of mappings; write {', '.join(_PARTS)} with settings below each"
        )
    if unknown := sorted(raw.keys() - set(_PARTS)):
        raise UserError(f"recipe {name!r} has unknown keys: {', '.join(unknown)}; choose from {', '.join(_PARTS)}")
    recipe = NamedRecipe(name, **raw)
    try:
        recipe.optim_config()
        recipe.loss_config()
    except TypeError as error:
        raise UserError(f"recipe {name!r}: {error}; correct the file") from None
    return recipe
