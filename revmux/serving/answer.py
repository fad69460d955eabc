"""The answer to one input, and the place that receives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from revmux.labels import ScoreFunction, name_labels, rank_many


class Answer(NamedTuple):
    """The model's answer to one input.

    Attributes:
        scores: (C,) float32 on the CPU, before softmax.
        width: N of the last group that the input was in; 1 is the plain model or an exit head.
        method: method of the last group that the input was in; ``siso`` is the plain model.
        queue_seconds: time from queueing to the start of the forward pass.
        inference_seconds: time of the forward pass, from padding to scores on the CPU.
        truncated: whether the text was cut to the task's ``max_length``.
        fell_back: whether the confidence of the group's answer was below the threshold, so that the input resumed
            alone and ``scores`` are the plain model's.
        stage: the stage of the ladder that answered, from 1; 0 is the plain model.
        tokenize_seconds: time of tokenization.
        tokens: number of tokens of the input.
        group: number of the last group that the input was in, unique within the engine.
        started: start of the forward pass, on the clock of :func:`time.perf_counter`.
        steps: seconds of the pass per step, see :mod:`revmux.serving.forward`.
        ranking: the labels and their probabilities, highest first: a row of :func:`revmux.labels.order_labels`, computed for
            all inputs of a pass at once. None if it is not known.
    """

    scores: Tensor
    width: int
    method: str
    queue_seconds: float
    inference_seconds: float
    truncated: bool = False
    fell_back: bool = False
    stage: int = 0
    tokenize_seconds: float = 0.0
    tokens: int = 0
    group: int = 0
    started: float = 0.0
    steps: Mapping[str, float] = MappingProxyType({})
    ranking: tuple[Sequence[int], Sequence[float]] | None = None


class Slot(Protocol):
    """The place of one input's answer. :class:`concurrent.futures.Future` is one, too."""

    def cancelled(self) -> bool:
        """Whether the answer is no longer wanted."""

    def set_running_or_notify_cancel(self) -> bool:
        """Announce that the input runs. Return False if its answer is no longer wanted."""

    def set_result(self, result: Answer, /) -> None:
        """Set the answer."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Set the error in place of an answer."""


def rank_answers(
    answers: Sequence[Answer],
    label_names: Sequence[str],
    function: ScoreFunction | None = None,
    top_k: int | None = None,
) -> list[list[tuple[str, float]]]:
    """The labels of each answer with their scores, highest score first, as by :func:`revmux.labels.rank_labels`."""
    known = [answer.ranking for answer in answers if answer.ranking is not None]
    if function is None and len(known) == len(answers):
        return name_labels([order for order, _ in known], [values for _, values in known], label_names, top_k)
    return rank_many(torch.stack([answer.scores for answer in answers]), label_names, function, top_k)
