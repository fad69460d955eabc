"""The loss equals numbers computed by hand, and is the same for any number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from numeric import approx, assert_close
from torch import Tensor

from revmux import UserError
from revmux.training.config import LossConfig
from revmux.training.losses import ContrastSet, gather_from_workers, infonce, training_loss

pytestmark = pytest.mark.numeric

ONE_APART = math.log(1 + math.exp(-1))  # −log softmax of 1 against 0


def config(negatives: str, similarity: str, temperature: float = 1.0, **weights: float) -> LossConfig:
    return LossConfig(negatives=negatives, similarity=similarity, temperature=temperature, **weights)  # type: ignore[arg-type]


def axes(*scales: float) -> Tensor:
    """One group whose k-th vector lies on the k-th axis."""
    return torch.diag(torch.tensor(scales)).unsqueeze(0)


@pytest.mark.parametrize("negatives", ["group", "batch"])
def test_the_loss_of_one_group_equals_the_value_computed_by_hand(negatives: str) -> None:
    restored, teacher = axes(2.0, 1.0), axes(3.0, 1.0)
    # Cosines are 1 and 0; dot products are 6 and 1 on the diagonal, 0 beside it.
    assert infonce(restored, teacher, config(negatives, "cosine")).item() == approx(ONE_APART)
    expected = math.log(1 + math.exp(-2))
    assert infonce(restored, teacher, config(negatives, "cosine", 0.5)).item() == approx(expected)
    expected = (math.log(1 + math.exp(-6)) + ONE_APART) / 2
    assert infonce(restored, teacher, config(negatives, "dot")).item() == approx(expected)


def test_batch_negatives_include_other_groups_and_group_negatives_do_not() -> None:
    twice = axes(1.0, 1.0).repeat(2, 1, 1)  # (2, 2, 2): every vector also occurs in the other group
    assert infonce(twice, twice, config("group", "cosine")).item() == approx(ONE_APART)
    assert infonce(twice, twice, config("batch", "cosine")).item() == approx(ONE_APART + math.log(2))


def test_an_input_that_occurs_twice_is_not_its_own_negative() -> None:
    twice, settings = axes(1.0, 1.0).repeat(2, 1, 1), config("batch", "cosine")
    rows = torch.tensor([7, 8, 7, 8])
    known = infonce(twice, twice, settings, ContrastSet(twice.flatten(0, 1), 0, rows))
    assert known.item() == approx(math.log(1 + 2 * math.exp(-1))), "the other input counts twice"
    second = infonce(twice[1:], twice[1:], settings, ContrastSet(twice.flatten(0, 1), 2, torch.tensor([7, 8, 9, 8])))
    assert second.item() == approx((ONE_APART + math.log(2) + math.log(1 + 2 * math.exp(-1))) / 2)


def test_the_teacher_of_an_input_is_the_one_of_the_same_slot() -> None:
    swapped = axes(1.0, 1.0).flip(1)
    for negatives in ("group", "batch"):
        right = infonce(axes(1.0, 1.0), axes(1.0, 1.0), config(negatives, "dot"))
        wrong = infonce(axes(1.0, 1.0), swapped, config(negatives, "dot"))
        assert wrong.item() == approx(right.item() + 1)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    scores = torch.zeros(1, 2, 2)
    teacher_scores = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])  # 3/4 and 1/4; even
    labels = torch.tensor([[0, 1]])
    weights = config("group", "cosine", infonce_weight=0.5, distillation_weight=2.0)
    parts = training_loss(scores, axes(1.0, 1.0), labels, axes(1.0, 1.0), teacher_scores, weights)
    divergence = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2  # the second input contributes 0
    assert parts["cross_entropy"].item() == approx(math.log(2))
    assert parts["infonce"].item() == approx(ONE_APART)
    assert parts["distillation"].item() == approx(divergence)
    assert parts["loss"].item() == approx(math.log(2) + 0.5 * ONE_APART + 2 * divergence)


def test_loss_terms_without_weight_or_teacher_are_left_out() -> None:
    scores, labels, vectors = torch.randn(2, 2, 3), torch.zeros(2, 2, dtype=torch.long), torch.randn(2, 2, 4)
    alone = training_loss(scores, vectors, labels, None, None, LossConfig(distillation_weight=1.0))
    unweighted = training_loss(scores, vectors, labels, vectors, scores, LossConfig(infonce_weight=0.0))
    assert set(alone) == set(unweighted) == {"loss", "cross_entropy"}
    assert torch.equal(alone["loss"], alone["cross_entropy"])


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"infonce_weight": -1.0}, "infonce_weight"),
        ({"negatives": "all"}, "batch, group"),
        ({"similarity": "l2"}, "cosine, dot"),
    ],
)
def test_invalid_settings_are_refused(setting: dict, names: str) -> None:
    with pytest.raises(UserError, match=names):
        LossConfig(**setting)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """64 inputs in 32 groups of 2, and a weight that restores and scores them."""
    random = torch.Generator().manual_seed(0)
    inputs, teacher = torch.randn(2, 32, 2, 8, generator=random)
    labels = torch.randint(0, 3, (32, 2), generator=random)
    return inputs, teacher, labels, torch.randn(8, 8, generator=random)


def loss_and_gradient(groups: slice, settings: LossConfig) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of the weight, averaged over workers as in data-parallel training."""
    inputs, teacher, labels, weight = problem()
    weight.requires_grad_(True)
    restored = inputs[groups] @ weight
    scores, teacher_scores = restored[..., :3], teacher[groups][..., :3]
    loss = training_loss(scores, restored, labels[groups], teacher[groups], teacher_scores, settings)["loss"]
    loss.backward()
    assert weight.grad is not None
    result = torch.stack([loss.detach().expand_as(weight), weight.grad])
    if dist.is_initialized():
        dist.all_reduce(result)
        result /= dist.get_world_size()
    return result[0, 0, 0], result[1]


def half_the_groups(settings: list[LossConfig]) -> list[tuple[Tensor, Tensor]]:
    rank = dist.get_rank()
    return [loss_and_gradient(slice(16 * rank, 16 * rank + 16), choice) for choice in settings]


def test_two_workers_with_32_inputs_have_the_gradient_of_one_with_64(run_workers: Callable) -> None:
    settings = [config(negatives, "cosine", 0.1, distillation_weight=0.5) for negatives in ("batch", "group")]
    whole = [loss_and_gradient(slice(None), choice) for choice in settings]
    halves = [loss_and_gradient(half, settings[0])[0] for half in (slice(16), slice(16, 32))]
    assert abs(sum(halves) / 2 - whole[0][0]) > 1e-2, "without the other worker's negatives the loss differs"
    for results in run_workers(half_the_groups, 2, settings):
        for (loss, gradient), (expected_loss, expected_gradient) in zip(results, whole):
            assert_close(loss, expected_loss)
            assert_close(gradient, expected_gradient)


def gathered_gradient() -> tuple[int, Tensor, Tensor]:
    rank = dist.get_rank()
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    everything, offset = gather_from_workers(rows)
    (everything * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return offset, everything.detach(), rows.grad


def test_gathered_rows_are_ordered_by_rank_and_carry_gradients(run_workers: Callable) -> None:
    for rank, (offset, everything, gradient) in enumerate(run_workers(gathered_gradient, 2)):
        assert offset == 2 * rank
        assert everything[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
        assert torch.equal(gradient, torch.full((2, 3), 3.0)), "both workers' uses of a row, 1 + 2"
