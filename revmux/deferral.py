"""Learned confidence: how probable it is that the plain model gives the same answer.

A logistic model on the scores of all stages that an input has passed and on its length. Plain confidence misjudges
answers under label noise and shift, and ignores earlier stages (Jitkrittum et al., 2023, arXiv 2307.02764).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from revmux.errors import UserError

if TYPE_CHECKING:  # adapters are checked before torch is imported
    from torch import Tensor

LARGEST = 30.0
"""Largest size of a feature."""


@dataclass(frozen=True)
class Deferral:
    """The logistic model of one stage of a ladder.

    Attributes:
        weights: (2k + 1), those of the features of :func:`deferral_features` for stage k.
        bias: added to the weighted sum.
    """

    weights: tuple[float, ...]
    bias: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], stage: int, where: str) -> Deferral:
        """Read a model that :func:`dataclasses.asdict` wrote.

        Args:
            values: the fields.
            stage: number of the stage, from 1.
            where: where the values come from, for the error message.

        Raises:
            UserError: the weights are not those of the stage, or a value is not a finite number.
        """
        weights, bias = values.get("weights"), values.get("bias")
        numbers: list[Any] = [*weights, bias] if isinstance(weights, (list, tuple)) else [None]
        if len(numbers) != 2 * stage + 2 or not all(
            isinstance(number, (int, float)) and math.isfinite(number) for number in numbers
        ):
            raise UserError(
                f"{where}: deferral is {dict(values)!r:.80}; stage {stage} needs {2 * stage + 1} finite weights and a bias, "
                "as a plan writes them"
            )
        return cls(tuple(map(float, numbers[:-1])), float(numbers[-1]))

    def confidence(self, passed: Sequence[Tensor], lengths: Tensor) -> Tensor:
        """The predicted probability that the plain model gives the answer of the last stage.

        Args:
            passed: for each stage so far, the scores (..., C) of the inputs.
            lengths: (...), tokens per input.

        Returns:
            (...), 0..1; NaN if a score of the last stage is not finite.
        """
        features = deferral_features(passed, lengths)  # (..., 2k + 1)
        logit = (features * features.new_tensor(self.weights)).sum(-1) + self.bias
        return logit.sigmoid().masked_fill(~passed[-1].isfinite().all(-1), math.nan)


def deferral_features(passed: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """What a learned confidence is computed from.

    Args:
        passed: for each of the k stages so far, the scores (..., C). A single class counts as two, yes and no.
        lengths: (...), tokens per input.

    Returns:
        (..., 2k + 1) float32: for each stage, the log-probability that it gives to the answer of the last one and the
        margin between its two most probable classes; then the logarithm of the length.
    """
    import torch

    logs = [_log_probabilities(scores) for scores in passed]
    answer = logs[-1].argmax(-1, keepdim=True)
    columns = []
    for log in logs:
        best = log.topk(2, dim=-1).values
        columns += [log.gather(-1, answer).squeeze(-1), best[..., 0] - best[..., 1]]
    columns.append(lengths.to(logs[-1]).log())
    return torch.stack(columns, dim=-1).clamp(-LARGEST, LARGEST)


def _log_probabilities(scores: Tensor) -> Tensor:
    scores = scores.float()
    if scores.shape[-1] == 1:
        scores = scores * scores.new_tensor([0.0, 1.0])
    return scores.log_softmax(-1)
