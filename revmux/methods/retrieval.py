"""The retrieval objective of DataMUX and MUX-PLM: predict the token of a slot from the shared state at its position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revmux.errors import UserError


@dataclass(frozen=True)
class RetrievalQuestions:
    """P questions: which token does slot ``slots`` of group ``rows`` have at position ``positions``?

    Attributes:
        rows: (P,) long, the group.
        positions: (P,) long, the position in the sequence.
        slots: (P,) long, the slot.
        labels: (P,) long, the correct token id.
    """

    rows: Tensor
    positions: Tensor
    slots: Tensor
    labels: Tensor


def sample_questions(token_ids: Tensor, mask: Tensor, fraction: float) -> RetrievalQuestions:
    """Choose one random slot per position, and a random fraction of these questions. Padding is excluded.

    Args:
        token_ids: (G, N, S) long.
        mask: (G, N, S), 0 or False at padding.
        fraction: fraction of the positions, in 0..1.
    """
    groups, num_inputs, length = token_ids.shape
    slots = torch.randint(num_inputs, (groups, length), device=token_ids.device)
    labels = token_ids.gather(1, slots.unsqueeze(1)).squeeze(1)  # (G, S)
    present = mask.gather(1, slots.unsqueeze(1)).squeeze(1) != 0  # (G, S)
    chosen = (torch.rand(groups, length, dtype=torch.float32, device=token_ids.device) < fraction) & present
    rows, positions = chosen.nonzero(as_tuple=True)
    return RetrievalQuestions(rows, positions, slots[rows, positions], labels[rows, positions])


def retrieval_loss(logits: Tensor, questions: RetrievalQuestions) -> Tensor:
    """Mean cross-entropy over the questions, or 0 if there are none.

    Args:
        logits: (P, V) token scores.
        questions: P questions.
    """
    return F.cross_entropy(logits, questions.labels, reduction="sum") / max(len(questions.labels), 1)


def check_retrieval(method: str, weight: float, fraction: float, warmup_steps: int) -> None:
    """Check the settings of the retrieval objective.

    Raises:
        UserError: a setting is out of range.
    """
    if weight < 0:
        raise UserError(f"{method}: retrieval_weight is {weight}; choose 0 or more")
    if not 0 < fraction <= 1:
        raise UserError(f"{method}: retrieval_fraction is {fraction}; choose a value above 0 and at most 1")
    if warmup_steps < 0:
        raise UserError(f"{method}: warmup_steps is {warmup_steps}; choose 0 or more")
    if warmup_steps and not weight:
        raise UserError(
            f"{method}: warmup_steps is {warmup_steps}, but retrieval_weight is 0; set retrieval_weight above 0"
        )
