"""When training stops, and that a restart does not change the result."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import approx
from tiny_training import trainer
from torch import Tensor

from revmux import UserError
from revmux.features.base import FeatureBatch
from revmux.features.online import OnlineFeatures
from revmux.pretrained.pretrained import Pretrained
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import OptimConfig
from revmux.training.trainer import Trainer, load_weights

pytestmark = pytest.mark.numeric


def history(running: Trainer) -> list[dict[str, float]]:
    return [
        {name: value for name, value in metrics.items() if not name.endswith("per_second")}
        for metrics in running.state.history
    ]


def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(
    tiny_pretrained: Pretrained, tiny_rows: list
) -> None:
    unbroken = trainer(tiny_pretrained, tiny_rows)
    list(unbroken.run())

    broken = trainer(tiny_pretrained, tiny_rows)
    reports = broken.run()
    next(reports), next(reports)
    kept = broken.state_dict()
    on_disk = io.BytesIO()
    torch.save(kept, on_disk)
    on_disk.seek(0)
    next(reports)
    assert kept["state"]["epoch"] == 2, "the checkpoint must not change as the run continues"

    restarted = trainer(tiny_pretrained, tiny_rows, seed=99)
    restarted.load_state_dict(torch.load(on_disk, weights_only=True))
    assert [report.epoch for report in restarted.run()] == [3, 4]
    assert history(restarted) == history(unbroken)
    expected = unbroken.trained_weights()
    assert all(torch.equal(value, expected[name]) for name, value in restarted.trained_weights().items())
    assert restarted.state.step == unbroken.total_steps


def test_training_stops_when_accuracy_stops_improving_and_stays_stopped(
    tiny_pretrained: Pretrained, tiny_rows: list
) -> None:
    still = OptimConfig(epochs=9, batch_size=16, learning_rate=1e-12, patience=2)
    running = trainer(tiny_pretrained, tiny_rows, still)
    reports = list(running.run())
    assert [(report.is_best, report.stop) for report in reports] == [(True, False), (False, False), (False, True)]

    restarted = trainer(tiny_pretrained, tiny_rows, still)
    restarted.load_state_dict(running.state_dict())
    assert list(restarted.run()) == [], "a run that had stopped does not continue after a restart"


class Stopped(Exception):
    """The process is stopped here."""


def test_a_run_stopped_within_an_epoch_resumes_at_that_step(
    tiny_pretrained: Pretrained, tiny_rows: list, tmp_path: Path
) -> None:
    optim = OptimConfig(epochs=3, batch_size=8, learning_rate=5e-3)  # 8 steps per epoch
    unbroken = trainer(tiny_pretrained, tiny_rows, optim)
    list(unbroken.run())

    def stop_after(step: int) -> Callable:
        def on_step(done: int, total: int, metrics: dict) -> None:
            if done == step:
                raise Stopped

        return on_step

    saved: dict[str, Any] = {"checkpoints": CheckpointFolder(tmp_path / "run"), "checkpoint_steps": 3}
    begun = trainer(tiny_pretrained, tiny_rows, optim, on_step=stop_after(14), **saved)
    assert begun.resume() == 0
    with pytest.raises(Stopped):
        list(begun.run())
    again = trainer(tiny_pretrained, tiny_rows, optim, seed=99, on_step=stop_after(20), **saved)
    assert again.resume() == 12
    assert (again.state.epoch, again.state.epoch_step) == (1, 4)
    with pytest.raises(Stopped):
        list(again.run())
    steps: list[int] = []
    last = trainer(tiny_pretrained, tiny_rows, optim, 7, on_step=lambda step, *_: steps.append(step), **saved)
    assert last.resume() == 18
    list(last.run())
    assert steps == list(range(19, 25))
    assert last.state.step == unbroken.state.step == 24
    for weights, expected in ((last.trained_weights(), unbroken.trained_weights()), (last.best, unbroken.best)):
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    for epoch, other in zip(history(last), history(unbroken), strict=True):
        assert epoch == approx(other)


def test_the_steps_after_a_restart_use_the_remaining_inputs(
    tiny_pretrained: Pretrained, tiny_rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(epochs=1, batch_size=8)
    asked: list[int] = []
    read = OnlineFeatures.batch

    def batch(self: OnlineFeatures, rows: Tensor) -> FeatureBatch:
        if len(self) == 64:  # the training split
            asked.extend(rows.tolist())
        return read(self, rows)

    def stop(done: int, total: int, metrics: dict) -> None:
        if done == 5:
            raise Stopped

    monkeypatch.setattr(OnlineFeatures, "batch", batch)
    saved: dict[str, Any] = {"checkpoints": CheckpointFolder(tmp_path / "run"), "checkpoint_steps": 5}
    with pytest.raises(Stopped):
        list(trainer(tiny_pretrained, tiny_rows, optim, on_step=stop, **saved).run())
    assert not (tmp_path / "run").exists(), "stopped before step 5 was saved"
    asked.clear()
    saved["checkpoint_steps"] = 4
    with pytest.raises(Stopped):
        list(trainer(tiny_pretrained, tiny_rows, optim, on_step=stop, **saved).run())
    done = asked[: 4 * 8]  # the inputs of the steps before the checkpoint
    asked.clear()
    again = trainer(tiny_pretrained, tiny_rows, optim, **saved)
    assert again.resume() == 4
    list(again.run())
    assert sorted(done + asked) == list(range(64))


def test_a_checkpoint_with_another_number_of_steps_is_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    kept = trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=16)).state_dict()
    with pytest.raises(UserError, match="the checkpoint has batch_size 16, but this run has 32"):
        trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=32)).load_state_dict(kept)


def test_weights_of_another_model_are_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows)
    weights = running.trained_weights()
    weights.pop("method.down.bias")
    with pytest.raises(UserError, match=r"another model: .* method\.down\.bias"):
        load_weights(running.model, weights)
