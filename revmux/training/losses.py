"""Cross-entropy + λ · InfoNCE (paper section 3.4), and optional distillation of the teacher's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from revmux.training.config import LossConfig
from revmux.training.distributed import rank_and_world


class ContrastSet(NamedTuple):
    """The teacher vectors among which InfoNCE must find each restored vector's own.

    Attributes:
        vectors: (Q, d), those of a whole step, over all workers and micro-batches.
        first: position in ``vectors`` of the first of this call's own teacher vectors.
        rows: (Q,) long, the input that each vector belongs to, so that an input that occurs twice is not its own
            negative; None if all inputs differ.
    """

    vectors: Tensor
    first: int
    rows: Tensor | None = None


def similarity_matrix(restored: Tensor, targets: Tensor, config: LossConfig) -> Tensor:
    """Similarities of restored vectors to teacher vectors, divided by τ.

    Args:
        restored: (..., P, d).
        targets: (..., Q, d).

    Returns:
        (..., P, Q).
    """
    if config.similarity == "cosine":
        restored, targets = F.normalize(restored, dim=-1), F.normalize(targets, dim=-1)
    return restored @ targets.transpose(-1, -2) / config.temperature


def infonce(restored: Tensor, teacher: Tensor, config: LossConfig, candidates: ContrastSet | None = None) -> Tensor:
    """InfoNCE: each restored vector must find its own teacher vector among the others.

    Args:
        restored: (G, N, d), what the classifier reads from the demultiplexer.
        teacher: (G, N, d), what the classifier reads if the same backbone processes the same input alone.
        candidates: with batch negatives, the teacher vectors of the whole step; by default those of this call,
            gathered from every worker.

    Returns:
        Scalar mean over the G·N inputs of this worker. With batch negatives, each input is compared with the
        teacher vectors of every worker, so the number of workers does not change the result.
    """
    if config.negatives == "group":
        logits = similarity_matrix(restored, teacher, config)  # (G, N, N)
        own = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:-1])  # (G, N)
        return F.cross_entropy(logits.flatten(0, 1), own.flatten())
    restored, teacher = restored.flatten(0, 1), teacher.flatten(0, 1)  # (P, d)
    vectors, first, rows = candidates or ContrastSet(*gather_from_workers(teacher))  # (Q, d)
    logits = similarity_matrix(restored, vectors, config)  # (P, Q)
    own = torch.arange(len(restored), device=logits.device) + first
    if rows is not None:
        twins = (rows[own].unsqueeze(1) == rows).scatter(1, own[:, None], False)  # (P, Q)
        logits = logits.masked_fill(twins, -torch.inf)
    return F.cross_entropy(logits, own)


def gather_from_workers(rows: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Gather the rows of every worker, with gradients.

    Args:
        rows: (P, d).
        counts: P of every worker; None if it is the same on all.

    Returns:
        (Q, d), Q the sum of all P, and the offset of this worker's rows in it; with one worker, ``rows`` and 0.
    """
    rank, world = rank_and_world()
    if world == 1:
        return rows, 0
    counts = counts or [len(rows)] * world
    rows = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))  # collectives need the same shape on every worker
    if rows.requires_grad:
        from torch.distributed.nn.functional import all_gather

        gathered = list(all_gather(rows.contiguous()))
    else:
        gathered = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(gathered, rows.contiguous())
    return torch.cat([part[:count] for part, count in zip(gathered, counts)]), sum(counts[:rank])


def training_loss(
    scores: Tensor,
    vectors: Tensor,
    labels: Tensor,
    teacher_vectors: Tensor | None,
    teacher_scores: Tensor | None,
    config: LossConfig,
    candidates: ContrastSet | None = None,
) -> dict[str, Tensor]:
    """The loss and its parts.

    Args:
        scores: (G, N, C).
        vectors: (G, N, d), what the classifier read.
        labels: (G, N) long.
        teacher_vectors: (G, N, d), or None if the method has no vector to match.
        teacher_scores: (G, N, C), or None without distillation.
        candidates: see :func:`infonce`.

    Returns:
        Scalars ``loss``, ``cross_entropy``, and ``infonce`` and ``distillation`` if they are part of the loss.
    """
    parts = {"cross_entropy": F.cross_entropy(scores.flatten(0, 1), labels.flatten())}
    loss = parts["cross_entropy"]
    if config.infonce_weight and teacher_vectors is not None:
        parts["infonce"] = infonce(vectors, teacher_vectors, config, candidates)
        loss = loss + config.infonce_weight * parts["infonce"]
    if config.distillation_weight and teacher_scores is not None:
        parts["distillation"] = F.kl_div(
            scores.flatten(0, 1).log_softmax(-1),
            teacher_scores.flatten(0, 1).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        loss = loss + config.distillation_weight * parts["distillation"]
    return {"loss": loss, **parts}
