"""Which inputs share a group, in training and in evaluation. A seed determines the groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from revmux.errors import UserError, one_of

Grouping = Literal["random", "length"]
"""How evaluation forms groups: at random, as in the paper, or by length within windows, as a server does."""
WINDOW = 128
"""Inputs of one window, the default number of inputs per forward pass of a server."""


class EpochSchedule:
    """The training groups of one epoch, step by step. Within a shuffled window, inputs of similar length share a group.

    The schedule is global and does not depend on the number of workers: each worker processes its share of every
    step. Every input occurs at least once, and never twice in one group. An incomplete group is filled with inputs
    of another group, and an incomplete step with copies of other groups.

    Windows are formed when their steps are reached, so the schedule takes four bytes per input.

    Args:
        lengths: (M,) tokens per input.
        num_inputs: N.
        groups_per_step: groups per step, over all workers.
        seed: determines the order, together with ``epoch``.
        epoch: 0-based. Each epoch has different groups.
        window_steps: number of steps whose inputs are sorted by length together.

    Raises:
        UserError: there are fewer than N inputs.
    """

    def __init__(
        self, lengths: Tensor, num_inputs: int, groups_per_step: int, seed: int, epoch: int, window_steps: int = 32
    ) -> None:
        total = len(lengths)
        if total < num_inputs:
            raise UserError(
                f"{total} training examples do not fill one group of N = {num_inputs}; use more data or a smaller N"
            )
        self.num_inputs, self.groups_per_step = num_inputs, groups_per_step
        self._lengths, self._random = lengths.numpy(), np.random.default_rng([seed, epoch])
        self._order = np.arange(total, dtype=np.int32 if total < 2**31 else np.int64)
        self._random.shuffle(self._order)
        self._window_size = num_inputs * groups_per_step * window_steps
        self._windows = -(-total // self._window_size)
        self._last = self._fill()

    def __len__(self) -> int:
        """The number of steps."""
        before = (self._windows - 1) * (self._window_size // self.num_inputs)
        return (before + len(self._last)) // self.groups_per_step

    def steps(self, first: int = 0) -> Iterator[Tensor]:
        """The groups of each step, (groups_per_step, N) long, from step ``first`` on. Can be called once."""
        done = 0
        for window in range(self._windows):
            is_last = window == self._windows - 1
            size = len(self._last) if is_last else self._window_size // self.num_inputs
            skipped = done + size // self.groups_per_step <= first
            # Skipped windows draw the same random numbers, but need not be sorted.
            groups = self._last if is_last else self._groups(window, sort=not skipped)
            # Slots differ, so the members of a group are assigned to slots at random.
            steps = self._random.permuted(groups.reshape(-1, self.groups_per_step, self.num_inputs), axis=2)
            order = self._random.permutation(len(steps))
            for step in order[max(0, first - done) :]:
                yield torch.from_numpy(steps[step])
            done += len(steps)

    def _members(self, window: int) -> np.ndarray:
        start = window * self._window_size
        return self._order[start : start + self._window_size].astype(np.int64)

    def _groups(self, window: int, sort: bool = True) -> np.ndarray:
        """The full groups (G, N) of a window, by length."""
        members = self._members(window)
        if sort:
            members = members[np.argsort(self._lengths[members], kind="stable")]
        return members[: len(members) // self.num_inputs * self.num_inputs].reshape(-1, self.num_inputs)

    def _full(self, group: int) -> np.ndarray:
        """The full group (N,) of the epoch with this number."""
        per_window = self._window_size // self.num_inputs
        found: np.ndarray = self._groups(group // per_window)[group % per_window]
        return found

    def _fill(self) -> np.ndarray:
        """The groups (G, N) of the last window, filled up to full steps and sorted by length."""
        last = self._groups(self._windows - 1)
        full = len(self._order) // self.num_inputs  # full groups of the epoch, those of the last window last
        short = len(self._order) % self.num_inputs
        if short:
            members = self._members(self._windows - 1)
            longest = members[np.argsort(self._lengths[members], kind="stable")][-short:]
            # Inputs of similar length complete the short group. They then occur twice, so their group is not copied.
            last = np.concatenate([last, np.concatenate([self._full(full - 1)[short:], longest])[None]])
            full = max(full - 1, 1)
        chosen = np.arange(full, dtype=self._order.dtype)
        self._random.shuffle(chosen)
        missing = -len(last) % self.groups_per_step
        copies = [self._full(int(group)) for group in np.resize(chosen, missing)]
        last = np.concatenate([last, *(copy[None] for copy in copies)])
        return last[np.argsort(self._lengths[last].max(axis=1), kind="stable")]


def epoch_groups(
    lengths: Tensor, num_inputs: int, groups_per_step: int, seed: int, epoch: int, window_steps: int = 32
) -> Tensor:
    """All steps of an :class:`EpochSchedule`, whose arguments these are: (steps, groups_per_step, N) long indices."""
    schedule = EpochSchedule(lengths, num_inputs, groups_per_step, seed, epoch, window_steps)
    return torch.stack(list(schedule.steps()))


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
