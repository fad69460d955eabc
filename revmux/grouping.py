"""Who shares a pass with whom: groups for training and for evaluation, fixed by a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from revmux.errors import UserError


def epoch_groups(
    lengths: Tensor, num_inputs: int, groups_per_step: int, seed: int, epoch: int, window_steps: int = 32
) -> Tensor:
    """One epoch of training groups: members of like length, found within a shuffled window.

    The schedule is global and does not depend on the number of workers: each takes its share of every step.
    Every input comes at least once, and none meets itself in a group. A group that stays short is filled from
    another, and a step that stays short by whole groups of the epoch.

    Args:
        lengths: (M,) tokens an input.
        num_inputs: N.
        groups_per_step: groups in a step, over all workers.
        seed: with ``epoch``, fixes the order.
        epoch: 0-based; each epoch groups anew.
        window_steps: steps whose inputs are sorted by length together.

    Returns:
        (steps, groups_per_step, N) long indices.

    Raises:
        UserError: fewer inputs than N.
    """
    total, per_step = len(lengths), num_inputs * groups_per_step
    if total < num_inputs:
        raise UserError(
            f"{total} training examples do not fill one group of N = {num_inputs}; bring more data or a smaller N"
        )
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(total)
    sizes = lengths.numpy()
    windows = []
    for start in range(0, total, per_step * window_steps):
        members = order[start : start + per_step * window_steps]
        windows.append(members[np.argsort(sizes[members], kind="stable")])
    groups = [window[: len(window) // num_inputs * num_inputs].reshape(-1, num_inputs) for window in windows]
    short = windows[-1][groups[-1].size :]
    groups[-1] = _fill(np.concatenate(groups), groups[-1], short, groups_per_step, random)
    groups[-1] = groups[-1][np.argsort(sizes[groups[-1]].max(axis=1), kind="stable")]
    shuffled = []
    for window in groups:
        # Slots are not all alike: which member of a group takes which slot is left to chance.
        steps = random.permuted(window.reshape(-1, groups_per_step, num_inputs), axis=2)
        shuffled.append(steps[random.permutation(len(steps))])
    return torch.from_numpy(np.concatenate(shuffled))


def _fill(
    full: np.ndarray, last: np.ndarray, short: np.ndarray, groups_per_step: int, random: np.random.Generator
) -> np.ndarray:
    """The groups of the last window, made up to whole steps.

    Args:
        full: (F, N) all full groups of the epoch, those of the last window last.
        last: (W, N) the full groups of the last window.
        short: (R,) the R < N inputs that are left over, the longest of their window.
        groups_per_step: what the result is a multiple of.
        random: draws the groups that come twice.

    Returns:
        (W', N) groups.
    """
    if len(short):
        # The neighbours by length make up the short group; they come twice already, so no copy is taken of theirs.
        donor = full[-1]
        last = np.concatenate([last, np.concatenate([donor[len(short) :], short])[None]])
        full = full[:-1] if len(full) > 1 else full
    missing = -len(last) % groups_per_step
    copies = np.resize(random.permutation(len(full)), missing)
    return np.concatenate([last, full[copies]])


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


def consecutive_groups(rows: int, num_inputs: int) -> Tensor:
    """Rows 0..B-1 in groups of N as they come; the last group is filled with its own members again.

    Returns:
        (G, N) long with G = ⌈B / N⌉.
    """
    groups = -(-rows // num_inputs)
    flat = torch.arange(groups * num_inputs)
    start = (groups - 1) * num_inputs
    members = rows - start  # in the last group
    flat[rows:] = start + (flat[rows:] - start) % max(members, 1)
    return flat.view(groups, num_inputs)


def gather_rows(values: Tensor, groups: Tensor, rows: int) -> Tensor:
    """Slots (G, N, ...) back to inputs (B, ...), averaging over the slots that one input filled."""
    flat = values.flatten(0, 1)  # (G·N, ...)
    index = groups.flatten()
    if index.numel() == rows and bool((index == torch.arange(rows, device=index.device)).all()):
        return flat
    total = torch.zeros(rows, *flat.shape[1:], dtype=flat.dtype, device=flat.device).index_add(0, index, flat)
    count = torch.bincount(index, minlength=rows).clamp(min=1).to(flat.dtype)
    return total / count.view(-1, *[1] * (flat.dim() - 1))
