"""A search space: lists of values for the knobs of a method, read from a page of YAML."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from revmux.errors import UserError, one_of
from revmux.methods import BackboneShape
from revmux.recipe import Recipe, check


@dataclass(frozen=True)
class SearchSpace:
    """Every combination of the lists is a point.

    Args:
        methods: names of methods.
        num_inputs: values of N; a method that serves one N only takes its own.
        prefill_layers: values of l; for ``exit-head`` the layers that it may leave at.
        infonce_weight: values of λ.
        learning_rate: peak rates; empty keeps the job's.
        options: settings of methods by name, the same for every point.
        epochs: of each trial; None keeps the job's.
        trials: at most so many points, drawn by ``seed``; None tries all.
        seed: of the draw.
    """

    methods: list[str] = field(default_factory=lambda: ["revmux"])
    num_inputs: list[int] = field(default_factory=lambda: [2])
    prefill_layers: list[int] = field(default_factory=lambda: [1])
    infonce_weight: list[float] = field(default_factory=lambda: [0.25])
    learning_rate: list[float] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: int | None = None
    trials: int | None = None
    seed: int = 0

    def points(self, recipe: Recipe) -> list[Recipe]:
        """The recipe of every trial.

        Raises:
            UserError: the space is empty.
        """
        points = list(dict.fromkeys(_hashable(self._points(recipe))))
        if not points:
            empty = [
                item.name for item in fields(self) if getattr(self, item.name) == [] and item.name != "learning_rate"
            ]
            raise UserError(f"the search space has no point: {', '.join(empty)} is empty; give it one value or more")
        drawn = [point.recipe for point in points]
        if self.trials is not None and self.trials < len(drawn):
            drawn = random.Random(self.seed).sample(drawn, self.trials)
        return drawn

    def _points(self, recipe: Recipe) -> Iterator[Recipe]:
        rates = self.learning_rate or [recipe.optim.learning_rate]
        epochs = self.epochs or recipe.optim.epochs
        for name, inputs, layers, weight, rate in itertools.product(
            self.methods, self.num_inputs, self.prefill_layers, self.infonce_weight, rates
        ):
            options = self.options.get(name, {})
            if name == "exit-head":
                inputs, weight, options = 1, 0.0, {**options, "layer": layers}
            method = replace(recipe.method, name=name, num_inputs=inputs, prefill_layers=layers, options=options)
            yield replace(
                recipe,
                method=method,
                loss=replace(recipe.loss, infonce_weight=weight),
                optim=replace(recipe.optim, learning_rate=rate, epochs=epochs),
            )

    def check(self, recipe: Recipe, shape: BackboneShape, workers: int) -> list[Recipe]:
        """The points, each checked against the backbone before anything starts.

        Raises:
            UserError: naming the first point that cannot be trained.
        """
        points = self.points(recipe)
        for point in points:
            try:
                check(point, shape, workers)
            except UserError as error:
                method = point.method
                raise UserError(
                    f"point {method.name}, N = {method.num_inputs}, l = {method.prefill_layers} of the space: {error}"
                ) from None
        return points


@dataclass(frozen=True)
class _Point:
    """A recipe that compares by what it says (its options are a dictionary, which has no hash)."""

    text: str
    recipe: Recipe = field(compare=False)


def _hashable(recipes: Iterator[Recipe]) -> Iterator[_Point]:
    return (_Point(repr(recipe), recipe) for recipe in recipes)


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
    known = {item.name for item in fields(SearchSpace)}
    if not isinstance(raw, dict) or raw.keys() - known:
        odd = ", ".join(map(str, sorted(raw.keys() - known))) if isinstance(raw, dict) else repr(raw)
        raise UserError(f"space {name!r} has unknown keys: {odd}; known: {', '.join(sorted(known))}")
    for key in ("methods", "num_inputs", "prefill_layers", "infonce_weight", "learning_rate"):
        if not isinstance(raw.get(key, []), list):
            raise UserError(f"space {name!r}: {key} is {raw[key]!r}; give a list of values, such as [{raw[key]!r}]")
    return SearchSpace(**raw)
