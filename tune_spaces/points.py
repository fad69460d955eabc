"""The points of a search space that a backbone can train."""

from __future__ import annotations

import random

from revmux.errors import UserError
from revmux.methods import BackboneShape
from revmux.training.config import Recipe
from revmux.training.recipe import check
from tune_spaces.space import SearchSpace


def valid_points(
    space: SearchSpace, recipe: Recipe, shape: BackboneShape, workers: int, longest: int | None = None
) -> tuple[list[Recipe], list[str]]:
    """The points of a space that a backbone can train, checked before anything starts.

    Args:
        space: the search space.
        recipe: the settings that the space does not set.
        shape: shape of the backbone.
        workers: workers per trial.
        longest: most tokens that the backbone reads, if known.

    Returns:
        The points, of which a random search draws ``trials``, and the reason for each point that cannot be trained.

    Raises:
        UserError: an unknown method, an empty space, or no point that can be trained.
    """
    points, left_out = [], []
    for point in space.points(recipe, shape.num_layers):
        try:
            check(point, shape, workers, longest)
            points.append(point)
        except UserError as error:
            method = point.method
            left_out.append(f"{method.name} N={method.num_inputs} l={method.prefill_layers}: {error}")
    if not points:
        raise UserError(f"the search space has no valid point for this backbone: {left_out[0]}")
    if space.search == "random" and space.trials is not None and space.trials < len(points):
        points = random.Random(space.seed).sample(points, space.trials)
    return points, list(dict.fromkeys(left_out))
