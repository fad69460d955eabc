"""The training loop: which weights change, what a step computes, and the settings that it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from numeric import assert_close
from tiny_training import FAST, changed, snapshot, split, trainer
from torch import Tensor

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.features.base import FeatureBatch
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.losses import ContrastSet
from revmux.training.trainer import Trainer

pytestmark = pytest.mark.numeric


def test_the_loss_decreases_and_only_adapters_change(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=16, batch_size=16, learning_rate=5e-3, seed=2))
    backbone, method = snapshot(running.model.backbone), snapshot(running.model.method)
    reports = list(running.run())
    losses = [report.metrics["train_cross_entropy"] for report in reports]
    assert losses[-1] < 0.5 * losses[0]
    assert reports[-1].metrics["selection_accuracy"] > 0.8, "the first word determines the label"
    assert changed(backbone, running.model.backbone) == set()
    assert changed(method, running.model.method) == set(method)
    assert [report.epoch for report in reports] == list(range(1, 17))
    assert [report.stop for report in reports] == [False] * 15 + [True]
    best = max(report.metrics["selection_accuracy"] for report in reports)
    assert running.state.best_accuracy == best
    assert reports[running.state.best_epoch - 1].is_best


def test_accumulated_steps_train_the_same_weights_as_whole_steps(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    def weights(accumulate: int) -> dict[str, Tensor]:
        optim = OptimConfig(epochs=2, batch_size=16, learning_rate=5e-3, accumulate=accumulate)
        running = trainer(tiny_pretrained, tiny_rows, optim, options={"own_state": "linear"})
        list(running.run())
        return running.trained_weights()

    whole, parts = weights(1), weights(4)
    for name, value in whole.items():
        assert_close(parts[name], value, layers=100)  # two epochs of steps
    with pytest.raises(UserError, match=r"num_inputs × workers × accumulate \(2 × 1 × 3 = 6\).* choose 6"):
        trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=4, accumulate=3))


def test_each_part_of_a_step_uses_the_teachers_of_the_whole_step(
    tiny_pretrained: Pretrained, tiny_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch repeats groups to fill up, and their inputs must not be their own negatives."""
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=1, batch_size=24, accumulate=2))
    forward, twins = running.train_step.forward, []

    def checked(
        batch: FeatureBatch, groups: Tensor, teachers: Tensor, warmup: bool, candidates: ContrastSet
    ) -> dict[str, Tensor]:
        own = groups.numel()
        assert batch.teacher_vectors is not None
        assert torch.equal(teachers, batch.teacher_vectors[groups].float())
        assert candidates.rows is not None
        assert torch.equal(candidates.vectors[candidates.first :][:own], teachers.flatten(0, 1))
        everything = running.train_data.batch(candidates.rows).teacher_vectors
        assert_close(candidates.vectors, everything)
        twins.append(len(candidates.rows) - len(candidates.rows.unique()))
        return forward(batch, groups, teachers, warmup, candidates)

    monkeypatch.setattr(running.train_step, "forward", checked)
    list(running.run())
    assert sum(map(bool, twins)) == 2, "repeated inputs occur in both parts of one step"


def test_steps_are_reported_without_warnings(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    reported: list[tuple[int, int]] = []
    tokens = 0

    def on_step(step: int, total: int, metrics: dict) -> None:
        nonlocal tokens
        reported.append((step, total))
        tokens += metrics["tokens"]

    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=1, batch_size=16), on_step=on_step)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*requires_grad.*")
        list(running.run())
    assert reported == [(step, 4) for step in range(1, 5)]
    assert tokens == sum(len(row["text"].split()) + 2 for row in tiny_rows[:64])


def test_the_learning_rate_rises_then_falls_to_zero(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=5, batch_size=16, warmup_share=0.2))
    rates = [running._rate(step) for step in range(21)]  # 20 steps, 4 of them warm-up
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == 0.0


def test_a_loss_that_is_not_finite_ends_the_run(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=3, batch_size=16, learning_rate=1e30))
    with pytest.raises(UserError, match=r"in epoch \d; lower learning_rate \(now 1e\+30\)"):
        list(running.run())


def test_a_batch_that_cannot_be_divided_into_groups_is_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    with pytest.raises(UserError, match=r"batch_size \(15\) must be divisible"):
        trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=15))


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("learning_rate", 0.0), ("clip", -1.0), ("patience", -1), ("warmup_share", 1.0)],
)
def test_invalid_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        OptimConfig(**{field: value})  # type: ignore[arg-type]


def test_a_method_with_nothing_to_train_is_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    model = MultiplexedClassifier(
        tiny_pretrained.backbone, build_method("siso", BackboneShape.of(tiny_pretrained.backbone), 1), 1
    )
    data = split(tiny_pretrained, tiny_rows)
    with pytest.raises(UserError, match="siso has no weights to train"):
        Trainer(model, data, data, FAST, LossConfig())
