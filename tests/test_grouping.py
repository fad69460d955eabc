"""Which inputs share a group: every input is used, and only the seed decides."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revmux import UserError
from revmux.grouping import (
    EpochSchedule,
    consecutive_groups,
    epoch_groups,
    evaluation_groups,
    gather_rows,
    local_rows,
    served_groups,
    shuffled_groups,
)
from revmux.training.config import OptimConfig
from revmux.training.distributed import shares


def lengths(total: int) -> Tensor:
    return torch.randint(3, 60, (total,), generator=torch.Generator().manual_seed(total))


@given(
    total=st.integers(1, 150),
    num_inputs=st.integers(1, 8),
    per_step=st.integers(1, 6),
    window_steps=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_an_epoch_uses_every_input_and_no_group_contains_an_input_twice(
    total: int, num_inputs: int, per_step: int, window_steps: int, epoch: int
) -> None:
    assume(total >= num_inputs)
    schedule = epoch_groups(lengths(total), num_inputs, per_step, seed=0, epoch=epoch, window_steps=window_steps)
    assert schedule.shape == (-(-total // (num_inputs * per_step)), per_step, num_inputs)
    times = torch.bincount(schedule.flatten(), minlength=total)
    assert times.min() >= 1
    members = schedule.flatten(0, 1).sort(dim=1).values
    assert bool((members[:, 1:] != members[:, :-1]).all()), "an input occurs twice in a group"
    if total >= num_inputs * per_step:
        assert times.max() <= 2, "steps are filled with each input at most once more"
    if total % (num_inputs * per_step) == 0:
        assert times.max() == 1


def test_a_short_group_is_filled_with_inputs_of_similar_length() -> None:
    sizes = torch.arange(3, 38)  # 35 inputs: two steps of 16 and a group of 3
    schedule = epoch_groups(sizes, 4, 4, seed=0, epoch=0)
    (longest,) = [group for group in schedule.flatten(0, 1).tolist() if {32, 33, 34} <= set(group)]
    assert min(longest) == 31


def test_workers_share_a_step_as_evenly_as_they_can() -> None:
    assert [shares(8, workers) for workers in (1, 2, 3, 8)] == [[8], [4, 4], [3, 3, 2], [1] * 8]


def test_the_schedule_depends_only_on_seed_and_epoch() -> None:
    def schedule(seed: int, epoch: int) -> Tensor:
        return epoch_groups(lengths(64), 2, 4, seed, epoch)

    assert torch.equal(schedule(1, 2), schedule(1, 2))
    assert not torch.equal(schedule(1, 2), schedule(1, 3))
    assert not torch.equal(schedule(1, 2), schedule(2, 2))
    assert not torch.equal(schedule(1, 2), schedule(2, 1)), "seed and epoch must not simply be added"


@pytest.mark.parametrize("first", [1, 5, 12])
def test_a_schedule_that_resumes_continues_with_the_same_steps(first: int) -> None:
    sizes = lengths(200).to(torch.int16)
    schedule = EpochSchedule(sizes, 3, 5, seed=0, epoch=1, window_steps=4)
    assert len(schedule) == 14
    whole = epoch_groups(sizes, 3, 5, seed=0, epoch=1, window_steps=4)
    assert torch.equal(torch.stack(list(schedule.steps(first))), whole[first:])


def test_a_schedule_takes_four_bytes_per_input() -> None:
    sizes = torch.ones(1_000_000, dtype=torch.int16)
    tracemalloc.start()
    steps = EpochSchedule(sizes, 2, 16, seed=0, epoch=0).steps()
    next(steps)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4.2e6
    assert peak < 6.5e6, "two bytes per input more while the schedule is set up"


def test_members_of_a_group_have_similar_lengths() -> None:
    sizes = lengths(512)
    schedule = epoch_groups(sizes, 4, 8, seed=0, epoch=0, window_steps=16)
    spread = (sizes[schedule].amax(-1) - sizes[schedule].amin(-1)).double().mean()
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0)).view(-1, 4)
    assert spread < 0.1 * (sizes[order].amax(-1) - sizes[order].amin(-1)).double().mean()


def test_lengths_are_matched_within_a_window_only() -> None:
    sizes = torch.arange(64)
    first, second = (epoch_groups(sizes, 2, 4, seed=0, epoch=0, window_steps=4) for _ in range(2))
    assert torch.equal(first, second)
    windows = first.reshape(2, -1).sort(dim=1).values  # two windows of 4 steps × 4 groups × 2
    assert torch.equal(windows.flatten().sort().values, sizes)
    assert windows[0].max() > windows[1].min(), "windows mix all lengths"
    assert windows[1].max() > windows[0].min()
    for window in windows:
        pairs = {tuple(pair) for pair in window.view(-1, 2).tolist()}
        groups = first.reshape(-1, 2).sort(dim=1).values.tolist()
        assert pairs <= {tuple(group) for group in groups}, "neighbours by length in a window share a group"


def test_slots_and_the_order_of_steps_are_random() -> None:
    schedule = epoch_groups(torch.arange(256), 2, 4, seed=0, epoch=0)
    longer_first = (schedule[..., 0] > schedule[..., 1]).double().mean()
    assert 0.3 < longer_first < 0.7, "the longer of two is not always in the same slot"
    means = schedule.double().mean(dim=(1, 2))
    assert not torch.equal(means, means.sort().values), "steps must not be sorted by length"


def test_fewer_examples_than_a_group_are_refused() -> None:
    with pytest.raises(UserError, match="3 training examples do not fill one group of N = 4"):
        epoch_groups(lengths(3), 4, 1, seed=0, epoch=0)


def test_a_batch_size_that_is_no_multiple_of_n_is_refused_with_one_that_is() -> None:
    with pytest.raises(UserError, match=r"batch_size \(34\) must be divisible by num_inputs \(4\); choose 32"):
        OptimConfig(batch_size=34).check_groups(4, 2)
    with pytest.raises(UserError, match="choose 8"):
        OptimConfig(batch_size=2).check_groups(4, 2)
    OptimConfig(batch_size=36).check_groups(4, 2)  # five groups and four
    with pytest.raises(UserError, match=r"too small for num_inputs × workers × accumulate \(4 × 2 × 2 = 16\)"):
        OptimConfig(batch_size=12, accumulate=2).check_groups(4, 2)


@pytest.mark.parametrize(("total", "num_inputs"), [(12, 4), (13, 4), (3, 4), (7, 2), (5, 1)])
def test_a_shuffle_contains_every_input_and_fills_the_last_group_with_its_own_members(
    total: int, num_inputs: int
) -> None:
    groups = shuffled_groups(total, num_inputs, seed=3)
    full, rest = divmod(total, num_inputs)
    assert groups.shape == (full + bool(rest), num_inputs)
    assert groups.unique().tolist() == list(range(total))
    assert groups[:full].unique().numel() == full * num_inputs, "a full group contains no input twice"
    if rest:
        assert groups[-1].unique().numel() == rest
        assert not set(groups[-1].tolist()) & set(groups[:-1].flatten().tolist())
    assert torch.equal(groups, shuffled_groups(total, num_inputs, seed=3))


def test_all_shuffles_of_all_seeds_differ() -> None:
    """Seeds 0, 1 and 2 with ten shuffles each are thirty groupings, none of which is used twice."""
    made = {
        tuple(shuffled_groups(40, 2, seed, shuffle).flatten().tolist()) for seed in range(3) for shuffle in range(10)
    }
    assert len(made) == 30


@pytest.mark.parametrize(("total", "num_inputs"), [(300, 4), (13, 4), (3, 4), (257, 2), (5, 1), (130, 16)])
def test_groups_by_length_contain_every_input_once(total: int, num_inputs: int) -> None:
    groups = served_groups(lengths(total), num_inputs, seed=3, shuffle=1)
    assert groups.shape == (-(-total // num_inputs), num_inputs)
    assert groups.unique().tolist() == list(range(total))
    full = total // num_inputs
    assert groups[:full].unique().numel() == full * num_inputs, "a full group contains no input twice"
    assert torch.equal(groups, evaluation_groups("length", lengths(total), num_inputs, 3, 1))
    assert total <= 128 or not torch.equal(groups, served_groups(lengths(total), num_inputs, seed=3, shuffle=2))


def test_groups_by_length_are_formed_within_windows_of_random_arrivals() -> None:
    sizes = torch.arange(64)
    groups = served_groups(sizes, 2, seed=0, window=32)
    for window in groups.reshape(2, 32):
        assert torch.equal(window, window.sort(descending=True).values), "from the longest to the shortest"
    first, second = groups.reshape(2, 32)
    assert first.max() > second.min(), "windows mix all lengths"
    assert second.max() > first.min()
    spread = (sizes[groups].amax(1) - sizes[groups].amin(1)).double().mean()
    shuffled = shuffled_groups(64, 2, seed=0)
    assert spread < 0.2 * (sizes[shuffled].amax(1) - sizes[shuffled].amin(1)).double().mean()


def test_an_unknown_way_of_forming_groups_is_refused() -> None:
    with pytest.raises(UserError, match="grouping 'size'"):
        evaluation_groups("size", lengths(4), 2, 0, 0)  # type: ignore[arg-type]


def test_unshuffled_groups_keep_the_order_of_the_inputs() -> None:
    assert consecutive_groups(5, 2).tolist() == [[0, 1], [2, 3], [4, 4]]
    assert consecutive_groups(6, 4).tolist() == [[0, 1, 2, 3], [4, 5, 4, 5]]
    assert consecutive_groups(0, 4).shape == (0, 4)


def test_slots_of_one_input_are_averaged() -> None:
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]], [[5.0], [9.0]]])  # (3, 2, 1)
    groups = torch.tensor([[2, 0], [1, 1], [0, 0]])
    expected = [[(2 + 5 + 9) / 3], [(3 + 6) / 2], [1.0]]
    torch.testing.assert_close(gather_rows(values, groups, 3), torch.tensor(expected))


def test_slot_answers_are_returned_to_their_inputs() -> None:
    values = torch.arange(6.0).view(3, 2)
    groups = torch.tensor([[4, 0], [2, 5], [3, 1]])
    assert gather_rows(values, groups, 6).tolist() == [1.0, 5.0, 2.0, 4.0, 0.0, 3.0]
    assert gather_rows(values, consecutive_groups(6, 2), 6).tolist() == list(range(6))


def test_local_rows_name_each_input_once() -> None:
    groups = torch.tensor([[7, 3], [3, 9]])
    rows, inside = local_rows(groups)
    assert rows.tolist() == [3, 7, 9]
    assert torch.equal(rows[inside], groups)
