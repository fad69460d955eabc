"""A search space: lists of values for the settings of a method, read from a YAML file. Nothing heavy is imported here."""

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
    """Every combination of the lists is a point; an exit head has one input, no λ, and a layer that it leaves at.

    Args:
        methods: names of methods.
        num_inputs: values of N.
        prefill_layers: values of l: a whole number is a layer, a fraction below 1 a share of the backbone's layers.
        infonce_weight: values of λ.
        learning_rate: peak rates; empty keeps the job's.
        exit_layers: layers that exit heads leave at, written like ``prefill_layers``; empty means every layer but the last.
        options: settings of methods by name, the same for every point.
        epochs: of each trial; None keeps the job's.
        trials: at most so many points are tried; None tries all.
        search: how these are found: ``optuna`` looks for accuracy and cost at once in the light of what was tried,
            ``random`` draws them by ``seed`` beforehand.
        seed: of the draw or the search.
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
        """The recipe of every point, legal or not, each once.

        Args:
            recipe: what the space does not say.
            num_layers: L of the backbone.

        Raises:
            UserError: the space is empty.
        """
        points = list({repr(point): point for point in self._points(recipe, num_layers)}.values())
        if not points:
            empty = [name for name in KNOBS if not getattr(self, name)]
            raise UserError(f"the search space has no point: {', '.join(empty)} is empty; give it one value or more")
        return points

    def _points(self, recipe: Recipe, num_layers: int) -> Iterator[Recipe]:
        from revmux.methods import method_class  # brings torch, which a wrong space should not wait for

        rates = self.learning_rate or [recipe.optim.learning_rate]
        cuts = [layer_of(value, num_layers) for value in self.prefill_layers]
        exits = [layer_of(value, num_layers) for value in self.exit_layers] or list(range(1, num_layers))
        for name, rate in itertools.product(self.methods, rates):
            options = self.options.get(name, {})
            optim = replace(recipe.optim, learning_rate=rate, epochs=self.epochs or recipe.optim.epochs)
            exit_option = method_class(name).exit_option
            if exit_option is not None:
                knobs = [(1, layer, 0.0, {**options, exit_option: layer}) for layer in exits]
            else:
                knobs = [
                    (inputs, layers, weight, options)
                    for inputs, layers, weight in itertools.product(self.num_inputs, cuts, self.infonce_weight)
                ]
            for inputs, layers, weight, settings in knobs:
                method = replace(
                    recipe.method, name=name, num_inputs=inputs, prefill_layers=layers, options=dict(settings)
                )
                yield replace(recipe, method=method, loss=replace(recipe.loss, infonce_weight=weight), optim=optim)


def layer_of(value: int | float, num_layers: int) -> int:
    """A whole number as it is; a fraction between 0 and 1 as that share of the layers.

    Raises:
        UserError: a fraction above 1.
    """
    if float(value).is_integer():
        return int(value)
    if not 0 < value < 1:
        raise UserError(f"layer {value} of the space is neither a whole number nor a share between 0 and 1")
    return round(value * num_layers)


def space_names() -> list[str]:
    """The spaces that come with the project."""
    files = resources.files("tune_spaces").iterdir()
    return sorted(item.name.removesuffix(".yaml") for item in files if item.name.endswith(".yaml"))


def load_space(name: str) -> SearchSpace:
    """A space by its name, or from a user's own YAML file.

    Raises:
        UserError: no such space, or a key or value that a space does not have.
    """
    if name in space_names():
        text = resources.files("tune_spaces").joinpath(f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise one_of("search space", name, space_names(), "or name a YAML file of your own")
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"space {name!r} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise UserError(f"space {name!r} is {raw!r}; write keys with values, such as num_inputs: [2, 4]")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SearchSpace)
    if odd := sorted(map(str, raw.keys() - vars(parser.get_defaults()).keys())):
        known = ", ".join(sorted(vars(parser.get_defaults())))
        raise UserError(f"space {name!r} has unknown keys: {', '.join(odd)}; known: {known}")
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
            raise UserError(f"space {name!r}: {key} is {value}; choose 1 or more, or leave it out")
    return space
