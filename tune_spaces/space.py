"""Search spaces: lists of values for the settings of methods, read from YAML. This module imports nothing heavy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from revmux.errors import UserError, one_of
from revmux.training.config import Recipe
from revmux.training.recipes import named_recipe

KNOBS = ("methods", "num_inputs")
RUN_SETTINGS = ("seed", "accumulate", "precision", "gradient_checkpointing", "patience")
"""Settings of the optimizer that depend on the machine or the user, so that a space's recipe does not replace them."""
LORA_RANK = 8
"""Rank of the low-rank updates below an exit head, unless its options set it."""


@dataclass(frozen=True)
class SearchSpace:
    """A grid of settings: every combination of the lists is a point.

    An exit head has N = 1 and no λ, and ``exit_layers`` in place of ``prefill_layers``. All points have the same number of
    epochs, so that no method is compared with a longer training of another.

    Args:
        methods: names of methods.
        num_inputs: values of N.
        prefill_layers: values of l: a whole number is a layer, a fraction below 1 is a share of the backbone's layers.
            Empty means every layer but the last.
        infonce_weight: values of λ; if empty, the job's setting.
        learning_rate: peak learning rates; if empty, the job's setting.
        exit_layers: layers that exit heads read, written like ``prefill_layers``; empty means every layer but the last.
        exit_adapted: numbers of layers below an exit that LoRA adapts to it; 0 keeps all layers frozen.
        options: settings per method name, the same for every point. They take precedence over those of the recipe.
        recipe: named recipe of all points, which replaces the recipe, loss and optimizer of a job with another recipe. A
            command with the space has this recipe, and its other settings override single values. None means the job's.
        epochs: epochs of each trial; None means the job's setting.
        trials: most points to try; None tries all.
        search: how points are chosen if ``trials`` is smaller than the space: ``optuna`` uses earlier results to search
            for accuracy and low cost at the same time, ``random`` draws all points beforehand.
        seed: seed of the search or the draw.
    """

    methods: list[str] = field(default_factory=lambda: ["revmux"])
    num_inputs: list[int] = field(default_factory=lambda: [2])
    prefill_layers: list[int | float] = field(default_factory=lambda: [1])
    infonce_weight: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    exit_layers: list[int | float] = field(default_factory=list)
    exit_adapted: list[int] = field(default_factory=lambda: [0])
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: str | None = None
    epochs: int | None = None
    trials: int | None = None
    search: Literal["optuna", "random"] = "optuna"
    seed: int = 0

    def points(self, recipe: Recipe, num_layers: int) -> list[Recipe]:
        """The recipe of every distinct point, whether or not the backbone can train it.

        Args:
            recipe: the settings that the space does not set.
            num_layers: L of the backbone.

        Raises:
            UserError: the space is empty.
        """
        points = list({repr(point): point for point in self._points(recipe, num_layers)}.values())
        if not points:
            empty = [name for name in KNOBS if not getattr(self, name)]
            raise UserError(f"the search space has no point: {', '.join(empty)} is empty; add at least one value")
        return points

    def _points(self, recipe: Recipe, num_layers: int) -> Iterator[Recipe]:
        from revmux.methods import method_class  # imports torch, which an invalid space should not wait for

        if self.recipe is not None and self.recipe != recipe.name:
            named = named_recipe(self.recipe)
            kept = {key: getattr(recipe.optim, key) for key in RUN_SETTINGS}
            recipe = replace(recipe, name=self.recipe, optim=named.optim_config(**kept), loss=named.loss_config())
        rates = self.learning_rate or [recipe.optim.learning_rate]
        weights = self.infonce_weight or [recipe.loss.infonce_weight]
        every = list(range(1, num_layers))
        cuts = [layer_of(value, num_layers) for value in self.prefill_layers] or every
        exits = [layer_of(value, num_layers) for value in self.exit_layers] or every
        for name, rate in itertools.product(self.methods, rates):
            options = (
                named_recipe(recipe.name).options_of(name, self.options.get(name))
                if recipe.name
                else {**self.options.get(name, {})}
            )
            optim = replace(recipe.optim, learning_rate=rate, epochs=self.epochs or recipe.optim.epochs)
            exit_option = method_class(name).exit_option
            if exit_option is not None:
                grid = [
                    (
                        1,
                        max(0, layer - adapted),
                        0.0,
                        {**options, exit_option: layer} | adapted_options(options, adapted),
                    )
                    for layer, adapted in itertools.product(exits, self.exit_adapted)
                ]
            else:
                grid = [
                    (inputs, layers, weight, options)
                    for inputs, layers, weight in itertools.product(self.num_inputs, cuts, weights)
                ]
            for inputs, layers, weight, settings in grid:
                method = replace(
                    recipe.method, name=name, num_inputs=inputs, prefill_layers=layers, options=dict(settings)
                )
                yield replace(recipe, method=method, loss=replace(recipe.loss, infonce_weight=weight), optim=optim)


def adapted_options(options: Mapping[str, Any], adapted: int) -> dict[str, Any]:
    """The option of an exit head that adapts the layers below it, or none if their number is 0."""
    return {"lora_rank": options.get("lora_rank", LORA_RANK)} if adapted else {}


def layer_of(value: int | float, num_layers: int) -> int:
    """The layer that a value of a space stands for: a whole number is a layer, a fraction is a share of the layers.

    Raises:
        UserError: the value is neither a whole number nor between 0 and 1.
    """
    if float(value).is_integer():
        return int(value)
    if not 0 < value < 1:
        raise UserError(
            f"layer {value} of the space is neither a whole number nor a share between 0 and 1; choose one, such as 3 or 0.25"
        )
    return round(value * num_layers)


def space_names() -> list[str]:
    """The names of the spaces that are included in this package."""
    files = resources.files("tune_spaces").iterdir()
    return sorted(item.name.removesuffix(".yaml") for item in files if item.name.endswith(".yaml"))


def load_space(name: str) -> SearchSpace:
    """Load an included space by name, or a YAML file by path.

    Raises:
        UserError: no such space, or an invalid key or value.
    """
    if name in space_names():
        text = resources.files("tune_spaces").joinpath(f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise one_of("search space", name, space_names(), "choose one of these, or the path of a YAML file")
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"space {name!r} is not valid YAML ({str(error).splitlines()[0]}); correct the file") from None
    if not isinstance(raw, dict):
        raise UserError(f"space {name!r} is {raw!r}, not a mapping; write keys with values, such as num_inputs: [2, 4]")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SearchSpace)
    if unknown := sorted(map(str, raw.keys() - vars(parser.get_defaults()).keys())):
        known = ", ".join(sorted(vars(parser.get_defaults())))
        raise UserError(f"space {name!r} has unknown keys: {', '.join(unknown)}; choose from {known}")
    for key in (*KNOBS, "prefill_layers", "infonce_weight", "learning_rate", "exit_layers", "exit_adapted"):
        if not isinstance(raw.get(key, []), list):
            raise UserError(f"space {name!r}: {key} is {raw[key]!r}; give a list of values, such as [{raw[key]!r}]")
    try:
        space = SearchSpace(**parser.parse_object(raw).as_dict())
    except ArgumentError as error:
        raise UserError(f"space {name!r}: {' '.join(str(error).split())}") from None
    if any(adapted < 0 for adapted in space.exit_adapted):
        raise UserError(f"space {name!r}: exit_adapted is {space.exit_adapted}; choose numbers of layers, 0 for none")
    for key in ("epochs", "trials"):
        value = getattr(space, key)
        if value is not None and value < 1:
            raise UserError(f"space {name!r}: {key} is {value}; choose 1 or more, or omit it")
    return space
