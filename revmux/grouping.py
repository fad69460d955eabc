"""Which inputs share a group, in training and in evaluation. A seed determines the groups."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from revmux.errors import UserError, one_of

Grouping = Literal["random", "length"]
"""How evaluation forms groups: at random, as in the paper, or by length within windows, as a server does."""
WINDOW = 128
"""Inputs of one window, the default number of inputs per forward pass of a server."""


def epoch_groups(
    lengths: Tensor, num_inputs: int, groups_per_step: int, seed: int, epoch: int, window_steps: int = 32
) -> Tensor:
    """The training groups of one epoch. Within a shuffled window, inputs of similar length share a group.

    The schedule is global and does not depend on the number of workers: each worker processes its share of every
    step. Every input occurs at least once, and never twice in one group. An incomplete group is filled with inputs
    of another group, and an incomplete step with copies of other groups.

    Args:
        lengths: (M,) tokens per input.
        num_inputs: N.
        groups_per_step: groups per step, over all workers.
        seed: determines the order, together with ``epoch``.
        epoch: 0-based. Each epoch has different groups.
        window_steps: number of steps whose inputs are sorted by length together.

    Returns:
        (steps, groups_per_step, N) long indices.

    Raises:
        UserError: there are fewer than N inputs.
    """
    total, per_step = len(lengths), num_inputs * groups_per_step
    if total < num_inputs:
        raise UserError(
            f"{total} training examples do not fill one group of N = {num_inputs}; use more data or a smaller N"
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
        # Slots differ, so the members of a group are assigned to slots at random.
        steps = random.permuted(window.reshape(-1, groups_per_step, num_inputs), axis=2)
        shuffled.append(steps[random.permutation(len(steps))])
    return torch.from_numpy(np.concatenate(shuffled))


def _fill(
    full: np.ndarray, last: np.ndarray, short: np.ndarray, groups_per_step: int, random: np.random.Generator
) -> np.ndarray:
    """The groups of the last window, filled up to a multiple of ``groups_per_step``.

    Args:
        full: (F, N) all full groups of the epoch, those of the last window last.
        last: (W, N) the full groups of the last window.
        short: (R,) the R < N remaining inputs, the longest of their window.
        groups_per_step: the number of groups in the result is a multiple of this.
        random: chooses the groups that are copied.

    Returns:
        (W', N) groups.
    """
    if len(short):
        # Inputs of similar length complete the short group. They then occur twice, so their group is not copied.
        donor = full[-1]
        last = np.concatenate([last, np.concatenate([donor[len(short) :], short])[None]])
        full = full[:-1] if len(full) > 1 else full
    missing = -len(last) % groups_per_step
    copies = np.resize(random.permutation(len(full)), missing)
    return np.concatenate([last, full[copies]])


def shuffled_groups(total: int, num_inputs: int, seed: int, shuffle: int = 0) -> Tensor:
    """The evaluation groups of one shuffle. Each input occurs once; the last group repeats members to fill its slots.

    Args:
        total: M, the number of inputs.
        num_inputs: N.
        seed: seed of the evaluation. The shuffles of different seeds are independent.
        shuffle: 0-based number of the shuffle.

    Returns:
        (⌈M / N⌉, N) long indices.
    """
    return _shuffled(total, seed, shuffle)[consecutive_groups(total, num_inputs)]


def served_groups(lengths: Tensor, num_inputs: int, seed: int, shuffle: int = 0, window: int = WINDOW) -> Tensor:
    """Like :func:`shuffled_groups`, but inputs of similar length share a group, as a server groups waiting inputs.

    The inputs arrive in random order. Those of one window wait together and are grouped from the longest to the shortest.

    Args:
        lengths: (M,) tokens per input.
        num_inputs: N.
        seed: seed of the evaluation.
        shuffle: 0-based number of the shuffle.
        window: number of inputs that wait together, rounded down to full groups.

    Returns:
        (⌈M / N⌉, N) long indices.
    """
    order = _shuffled(len(lengths), seed, shuffle)
    windows = order.split(max(1, window // num_inputs) * num_inputs)
    arranged = [members[lengths[members].argsort(descending=True, stable=True)] for members in windows]
    return torch.cat(arranged)[consecutive_groups(len(lengths), num_inputs)]


def evaluation_groups(grouping: Grouping, lengths: Tensor, num_inputs: int, seed: int, shuffle: int) -> Tensor:
    """The groups of one shuffle, formed in the given way: :func:`shuffled_groups` or :func:`served_groups`.

    Raises:
        UserError: an unknown way of forming groups.
    """
    if grouping == "random":
        return shuffled_groups(len(lengths), num_inputs, seed, shuffle)
    if grouping == "length":
        return served_groups(lengths, num_inputs, seed, shuffle)
    raise one_of("grouping", grouping, get_args(Grouping), "choose one of these")


def _shuffled(total: int, seed: int, shuffle: int) -> Tensor:
    """A random order of the inputs. A seed sequence makes the orders of all pairs (seed, shuffle) independent."""
    return torch.from_numpy(np.random.default_rng([seed, shuffle]).permutation(total))


def local_rows(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows in the groups, and the groups as indices into those rows.

    Args:
        groups: (G, N) long.

    Returns:
        (R,) rows, and (G, N) indices into them.
    """
    rows, inverse = torch.unique(groups, return_inverse=True)
    return rows, inverse


def consecutive_groups(rows: int, num_inputs: int) -> Tensor:
    """Rows 0..B-1 in consecutive groups of N. The last group repeats its members to fill its slots.

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
    """Values per slot (G, N, ...) to values per input (B, ...), averaged over the slots of each input."""
    flat = values.flatten(0, 1)  # (G·N, ...)
    index = groups.flatten()
    if index.numel() == rows and bool((index == torch.arange(rows, device=index.device)).all()):
        return flat
    total = torch.zeros(rows, *flat.shape[1:], dtype=flat.dtype, device=flat.device).index_add(0, index, flat)
    count = torch.bincount(index, minlength=rows).clamp(min=1).to(flat.dtype)
    return total / count.view(-1, *[1] * (flat.dim() - 1))
