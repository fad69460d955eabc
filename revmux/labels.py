"""Label scores as ranked label names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from revmux.errors import one_of

ScoreFunction = Literal["softmax", "sigmoid", "none"]


def best_labels(scores: Tensor) -> Tensor:
    """The index of each input's best label: scores (M, C) to (M,) long. A single score gives its sign, yes or no."""
    return scores.argmax(dim=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()


def rank_labels(
    scores: Tensor, label_names: Sequence[str], function: ScoreFunction | None = None, top_k: int | None = None
) -> list[tuple[str, float]]:
    """Labels with their scores, highest score first.

    Args:
        scores: (C,) before softmax.
        label_names: C names.
        function: the function applied to the scores. None means softmax, or sigmoid if there is only one class.
        top_k: number of labels to return. None means all.

    Raises:
        UserError: the function is unknown.
    """
    function = function or ("sigmoid" if len(label_names) == 1 else "softmax")
    if function == "softmax":
        scores = scores.softmax(-1)
    elif function == "sigmoid":
        scores = scores.sigmoid()
    elif function != "none":
        raise one_of("function", function, get_args(ScoreFunction), "omit it to use the default of the model")
    values, order = torch.sort(scores, descending=True, stable=True)
    return [(label_names[index], value) for index, value in zip(order.tolist(), values.tolist())][:top_k]
