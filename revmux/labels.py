"""Label scores as the ranked labels that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from revmux.errors import one_of

ScoreFunction = Literal["softmax", "sigmoid", "none"]


def rank_labels(
    scores: Tensor, label_names: Sequence[str], function: ScoreFunction | None = None, top_k: int | None = None
) -> list[tuple[str, float]]:
    """Labels with their scores, best first.

    Args:
        scores: (C,) before softmax.
        label_names: C names.
        function: what is applied to the scores; None is softmax, or sigmoid where there is one class only.
        top_k: how many labels; None is all.
    """
    function = function or ("sigmoid" if len(label_names) == 1 else "softmax")
    if function == "softmax":
        scores = scores.softmax(-1)
    elif function == "sigmoid":
        scores = scores.sigmoid()
    elif function != "none":
        raise one_of("function", function, get_args(ScoreFunction), "leave it out for the model's usual one")
    values, order = torch.sort(scores, descending=True, stable=True)
    return [(label_names[index], value) for index, value in zip(order.tolist(), values.tolist())][:top_k]
