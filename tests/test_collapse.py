"""A run that ends on one class is restarted once and reported."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from numeric import assert_close

from revmux import BackboneShape, MultiplexedClassifier, build_method
from revmux.data.tokens import TokenizedSplit
from revmux.features.online import OnlineFeatures
from revmux.pretrained.pretrained import Pretrained
from revmux.training import trainer as module
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.trainer import Trainer

pytestmark = pytest.mark.numeric

STUCK = OptimConfig(epochs=2, batch_size=16, learning_rate=1e-12, weight_decay=0.0)
"""Weights stay where they start."""


def taught(pretrained: Pretrained, rows: list[dict[str, str]]) -> OnlineFeatures:
    """Texts whose labels are the plain model's answers, so that it is always right."""
    data = Dataset.from_list([{"text": row["text"], "label": 0} for row in rows])
    features = OnlineFeatures(TokenizedSplit(data, pretrained.tokenizer, 16), pretrained.backbone)
    scores = features.batch(range(len(rows))).teacher_scores
    assert scores is not None
    features.labels = scores.argmax(dim=-1)
    return features


def run_on(pretrained: Pretrained, rows: list[dict[str, str]], optim: OptimConfig, **arguments: Any) -> Trainer:
    """A trainer whose up-projection starts at zero, so that every answer is the same until it has learned something."""
    torch.manual_seed(0)
    method = build_method("revmux", BackboneShape.of(pretrained.backbone), 2, {"up": "inverse", "own_state": "linear"})
    for weight in method.up.parameters():
        torch.nn.init.zeros_(weight)
    train, selection = taught(pretrained, rows[:64]), taught(pretrained, rows)
    return Trainer(
        MultiplexedClassifier(pretrained.backbone, method, 1), train, selection, optim, LossConfig(), **arguments
    )


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, module.__name__)
    return caplog


def test_a_run_that_learns_nothing_is_restarted_once_and_reported(tiny_pretrained, tiny_rows, warned) -> None:
    trainer = run_on(tiny_pretrained, tiny_rows, STUCK)
    reports = list(trainer.run())
    assert [report.metrics["restarts"] for report in reports] == [0, 1, 1, 1]
    assert [report.stop for report in reports] == [False, False, False, True]
    assert reports[-1].step == trainer.total_steps == 4 * trainer.steps_per_epoch
    assert trainer.collapsed
    restarted, ended = (record.getMessage() for record in warned.records)
    assert "learned almost nothing" in restarted
    assert "restarting it once with learning_rate 3e-13" in restarted
    assert "choose a smaller N" in ended


def test_a_restart_starts_from_the_initial_weights(tiny_pretrained, tiny_rows, warned, monkeypatch) -> None:
    monkeypatch.setattr(module, "RESTART_RATE", 5e9)
    trainer = run_on(tiny_pretrained, tiny_rows, STUCK)
    initial = trainer.trained_weights()
    run = trainer.run()
    next(run), next(run)
    for name, weight in trainer.trained_weights().items():
        assert_close(weight, initial[name])
    list(run)
    assert not trainer.collapsed
    assert len(warned.records) == 1
    assert trainer.state.best_epoch > 2


def test_a_restart_warms_up_again(tiny_pretrained, tiny_rows, warned, monkeypatch) -> None:
    trainer = run_on(tiny_pretrained, tiny_rows, STUCK)
    trainer.model.method.warmup_steps = 3
    step, given = trainer.step, []

    def recorded(*arguments: Any) -> Any:
        given.append(arguments[3])
        return step(*arguments)

    monkeypatch.setattr(trainer, "step", recorded)
    list(trainer.run())
    assert given == 2 * ([True] * 3 + [False] * (2 * trainer.steps_per_epoch - 3))


def test_a_run_that_learns_is_not_restarted(tiny_pretrained, tiny_rows, warned) -> None:
    trainer = run_on(tiny_pretrained, tiny_rows, OptimConfig(epochs=4, batch_size=16, learning_rate=5e-3))
    assert [report.metrics["restarts"] for report in trainer.run()] == [0, 0, 0, 0]
    assert not warned.records


def test_a_restarted_run_resumes_from_its_checkpoint(tiny_pretrained, tiny_rows, monkeypatch) -> None:
    monkeypatch.setattr(module, "RESTART_RATE", 5e9)
    whole = run_on(tiny_pretrained, tiny_rows, STUCK)
    saved = None
    for report in whole.run():
        if report.epoch == 3:
            saved = copy.deepcopy(whole.state_dict())
    again = run_on(tiny_pretrained, tiny_rows, STUCK)
    assert saved is not None
    again.load_state_dict(saved)
    assert [report.epoch for report in again.run()] == [4]
    expected = whole.trained_weights()
    for name, weight in again.trained_weights().items():
        assert_close(weight, expected[name])


def test_nothing_is_concluded_from_few_examples_or_from_a_task_model_that_knows_nothing(
    tiny_pretrained, tiny_rows, warned
) -> None:
    few = run_on(tiny_pretrained, tiny_rows, STUCK)
    few.selection = taught(tiny_pretrained, tiny_rows[:20])
    ignorant = run_on(tiny_pretrained, tiny_rows, STUCK)
    ignorant.selection.labels = 1 - ignorant.selection.labels
    for trainer in (few, ignorant):
        assert [report.metrics["restarts"] for report in trainer.run()] == [0, 0]
    assert not warned.records
