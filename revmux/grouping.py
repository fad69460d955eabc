"""Who shares a pass with whom: groups for training and for evaluation, fixed by a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from revmux.errors import UserError
from revmux.model import consecutive_groups


def epoch_groups(
    lengths: Tensor, num_inputs: int, groups_per_step: int, seed: int, epoch: int, window_steps: int = 32
) -> Tensor:
    """One epoch of training groups: members of like length, found within a shuffled window.

    The plan is global and does not depend on the number of workers: each takes its share of every step.
    Every input comes at least once; the last step is filled up with inputs from the start of the order.

    Args:
        lengths: (M,) tokens an input.
        num_inputs: N.
        groups_per_step: groups in a step, over all workers.
        seed: with ``epoch``, fixes the order.
        epoch: 0-based; each epoch groups anew.
        window_steps: steps whose inputs are sorted by length together.

    Returns:
        (steps, groups_per_step, N) long indices.
    """
    total, per_step = len(lengths), num_inputs * groups_per_step
    if total < num_inputs:
        raise UserError(
            f"{total} training examples do not fill one group of N = {num_inputs}; bring more data or a smaller N"
        )
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(total)
    steps = -(-total // per_step)
    order = np.resize(order, steps * per_step)
    sizes = lengths.numpy()[order]
    planned = []
    for start in range(0, len(order), per_step * window_steps):
        window = slice(start, start + per_step * window_steps)
        by_length = order[window][np.argsort(sizes[window], kind="stable")].reshape(-1, groups_per_step, num_inputs)
        # Slots are not all alike: which member of a group takes which slot is left to chance.
        by_length = random.permuted(by_length, axis=2)
        planned.append(by_length[random.permutation(len(by_length))])
    return torch.from_numpy(np.concatenate(planned))


def shuffled_groups(total: int, num_inputs: int, seed: int) -> Tensor:
    """Evaluation groups of one shuffle: every input once, the last group filled with its own members again.

    Returns:
        (⌈M / N⌉, N) long indices.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(total))
    return order[consecutive_groups(total, num_inputs)]


def local_rows(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows that groups name, and the groups in terms of those.

    Args:
        groups: (G, N) long.

    Returns:
        (R,) rows, and (G, N) indices into them.
    """
    rows, inverse = torch.unique(groups, return_inverse=True)
    return rows, inverse
