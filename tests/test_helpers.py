"""The helpers of these tests: tolerances and polling."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close, relative_tolerance
from polling import wait_until


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_follows_the_type_and_the_size_of_the_values(dtype: torch.dtype, size: float) -> None:
    values = torch.linspace(-1, 1, 50, dtype=torch.float64) * size
    allowed = relative_tolerance(values.to(dtype)) * size
    assert_close((values + allowed / 2).to(dtype), values.to(dtype), layers=8)
    with pytest.raises(AssertionError):
        assert_close((values + 4 * allowed).to(dtype), values.to(dtype))


def test_the_tolerance_grows_with_the_layers_and_stays_far_below_a_real_difference() -> None:
    single = torch.zeros(1)
    assert relative_tolerance(single, layers=24) > 4 * relative_tolerance(single) > 0
    assert relative_tolerance(single, layers=24) < 1e-3
    assert relative_tolerance(single, single.half()) == relative_tolerance(single.half())


def test_every_item_of_a_sequence_is_compared() -> None:
    one, other = torch.ones(3), torch.ones(3)
    assert_close((one, other), (other, one))
    with pytest.raises(AssertionError):
        assert_close((one, other), (one, other + 0.01))
    with pytest.raises(ValueError, match="shorter"):
        assert_close((one, other), (one,))


def test_polling_ends_with_the_condition_the_deadline_or_a_failure() -> None:
    answers = iter(["", "", "there"])
    assert wait_until(lambda: next(answers), every=0.001) == "there"
    with pytest.raises(pytest.fail.Exception, match=r"not true within 0\.01 s"):
        wait_until(lambda: False, 0.01, every=0.001)
    with pytest.raises(pytest.fail.Exception, match="it broke"):
        wait_until(lambda: False, failure=lambda: "it broke")
