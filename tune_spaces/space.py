"""Search spaces: lists of values for the settings of methods, read from YAML. This module imports nothing heavy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from revmux.errors import UserError, one_of
from revmux.training.config import Recipe

KNOBS = ("methods", "num_inputs", "prefill_layers", "infonce_weight")


@dataclass(frozen=True)
class SearchSpace:
    """A grid of settings: every combination of the lists is a point.

    An exit head has N = 1 and no λ, and ``exit_layers`` in place of ``prefill_layers``.

    Args:
        methods: names of methods.
        num_inputs: values of N.
        prefill_layers: values of l: a whole number is a layer, a fraction below 1 is a share of the backbone's layers.
        infonce_weight: values of λ.
        learning_rate: peak learning rates; if empty, the job's setting.
        exit_layers: layers that exit heads read, written like ``prefill_layers``; empty means every layer but the last.
        options: settings per method name, the same for every point.
        epochs: epochs of each trial; None means the job's setting.
        trials: most points to try; None tries all.
        search: how points are chosen if ``trials`` is smaller than the space: ``optuna`` uses earlier results to search
            for accuracy and low cost at the same time, ``random`` draws all points beforehand.
        seed: seed of the search or the draw.
    """

    methods: list[str] = field(default_factory=lambda: ["revmux"])
    num_inputs: list[int] = field(default_factory=lambda: [2])
    prefill_layers: list[int | float] = field(default_factory=lambda: [1])
    infonce_weight: list[float] = field(default_factory=lambda: [0.25])
    learning_rate: list[float] = field(default_factory=list)
    exit_layers: list[int | float] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
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

        rates = self.learning_rate or [recipe.optim.learning_rate]
        cuts = [layer_of(value, num_layers) for value in self.prefill_layers]
        exits = [layer_of(value, num_layers) for value in self.exit_layers] or list(range(1, num_layers))
        for name, rate in itertools.product(self.methods, rates):
            options = self.options.get(name, {})
            optim = replace(recipe.optim, learning_rate=rate, epochs=self.epochs or recipe.optim.epochs)
            exit_option = method_class(name).exit_option
            if exit_option is not None:
                grid = [(1, layer, 0.0, {**options, exit_option: layer}) for layer in exits]
            else:
                grid = [
                    (inputs, layers, weight, options)
                    for inputs, layers, weight in itertools.product(self.num_inputs, cuts, self.infonce_weight)
                ]
            for inputs, layers, weight, settings in grid:
                method = replace(
                    recipe.method, name=name, num_inputs=inputs, prefill_layers=layers, options=dict(settings)
                )
                yield replace(recipe, method=method, loss=replace(recipe.loss, infonce_weight=weight), optim=optim)


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
    for key in (*KNOBS, "learning_rate", "exit_layers"):
        if not isinstance(raw.get(key, []), list):
            raise UserError(f"space {name!r}: {key} is {raw[key]!r}; give a list of values, such as [{raw[key]!r}]")
    try:
        space = SearchSpace(**parser.parse_object(raw).as_dict())
    except ArgumentError as error:
        raise UserError(f"space {name!r}: {' '.join(str(error).split())}") from None
    for key in ("epochs", "trials"):
        value = getattr(space, key)
        if value is not None and value < 1:
            raise UserError(f"space {name!r}: {key} is {value}; choose 1 or more, or omit it")
    return space
