"""The retrieval objective of DataMUX and MUX-PLM: say which token a slot holds at a place of the shared state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revmux.errors import UserError


@dataclass(frozen=True)
class RetrievalQuestions:
    """P questions: which token does slot ``slots`` of group ``rows`` hold at place ``places``?

    Attributes:
        rows: (P,) long, the group.
        places: (P,) long, the place in the sequence.
        slots: (P,) long, the slot.
        labels: (P,) long, the token id that answers.
    """

    rows: Tensor
    places: Tensor
    slots: Tensor
    labels: Tensor


def sample_questions(token_ids: Tensor, mask: Tensor, fraction: float) -> RetrievalQuestions:
    """A random slot at each place, and of these questions a random part; padding is never asked for.

    Args:
        token_ids: (G, N, S) long.
        mask: (G, N, S), 0 or False where there is padding.
        fraction: the part of the places that is asked about, 0..1.
    """
    groups, num_inputs, length = token_ids.shape
    slots = torch.randint(num_inputs, (groups, length), device=token_ids.device)
    labels = token_ids.gather(1, slots.unsqueeze(1)).squeeze(1)  # (G, S)
    present = mask.gather(1, slots.unsqueeze(1)).squeeze(1) != 0  # (G, S)
    asked = (torch.rand(groups, length, dtype=torch.float32, device=token_ids.device) < fraction) & present
    rows, places = asked.nonzero(as_tuple=True)
    return RetrievalQuestions(rows, places, slots[rows, places], labels[rows, places])


def retrieval_loss(logits: Tensor, questions: RetrievalQuestions) -> Tensor:
    """Mean cross-entropy over the questions, 0 where there are none.

    Args:
        logits: (P, V) token scores.
        questions: P questions.
    """
    return F.cross_entropy(logits, questions.labels, reduction="sum") / max(len(questions.labels), 1)


def check_retrieval(method: str, weight: float, fraction: float, warmup_steps: int) -> None:
    """Refuse settings that cannot train.

    Raises:
        UserError: naming the setting and its legal values.
    """
    if weight < 0:
        raise UserError(f"{method}: retrieval_weight is {weight}; choose 0 or more")
    if not 0 < fraction <= 1:
        raise UserError(f"{method}: retrieval_fraction is {fraction}; choose a value above 0, at most 1")
    if warmup_steps < 0:
        raise UserError(f"{method}: warmup_steps is {warmup_steps}; choose 0 or more")
    if warmup_steps and not weight:
        raise UserError(
            f"{method}: warmup_steps is {warmup_steps} with retrieval_weight 0; give retrieval a weight above 0"
        )
