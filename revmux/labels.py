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
    """Labels of one input with their scores, highest score first.

    Args:
        scores: (C,) before softmax.
        label_names: C names.
        function: the function applied to the scores. None means softmax, or sigmoid if there is only one class.
        top_k: number of labels to return. None means all.

    Raises:
        UserError: the function is unknown.
    """
    return rank_many(scores[None], label_names, function, top_k)[0]


def activate(scores: Tensor, function: ScoreFunction | None = None) -> Tensor:
    """Apply a function to the scores of M inputs, (M, C): by default softmax, or sigmoid if there is only one label.

    Raises:
        UserError: the function is unknown.
    """
    function = function or ("sigmoid" if scores.shape[-1] == 1 else "softmax")
    if function == "softmax":
        return scores.softmax(-1)
    if function == "sigmoid":
        return scores.sigmoid()
    if function != "none":
        raise one_of("function", function, get_args(ScoreFunction), "omit it to use the default of the model")
    return scores


def order_labels(scores: Tensor, function: ScoreFunction | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """The labels of M inputs, (M, C), highest score first, and the results of :func:`activate` in the same order.

    Raises:
        UserError: the function is unknown.
    """
    values, order = torch.sort(activate(scores, function), dim=-1, descending=True, stable=True)  # (M, C) each
    return order.tolist(), values.tolist()


def rank_many(
    scores: Tensor, label_names: Sequence[str], function: ScoreFunction | None = None, top_k: int | None = None
) -> list[list[tuple[str, float]]]:
    """The result of :func:`rank_labels` for M inputs: scores (M, C).

    Raises:
        UserError: the function is unknown.
    """
    return name_labels(*order_labels(scores, function), label_names, top_k)


def name_labels(
    order: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    label_names: Sequence[str],
    top_k: int | None = None,
) -> list[list[tuple[str, float]]]:
    """The result of :func:`rank_labels` for M inputs, from that of :func:`order_labels`."""
    return [
        [(label_names[index], value) for index, value in zip(indices, row)][:top_k]
        for indices, row in zip(order, values)
    ]
