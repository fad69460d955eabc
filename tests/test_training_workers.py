"""Several workers train the same weights as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from numeric import assert_close
from tiny_training import split
from torch import Tensor

from revmux import BackboneShape, MultiplexedClassifier, build_method
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import LossConfig, Negatives, OptimConfig
from revmux.training.distributed import mean_over_workers, rank_and_world
from revmux.training.trainer import Trainer

pytestmark = pytest.mark.numeric


def trained(folder: str, rows: list[dict[str, str]], name: str, prefill: int, options: dict) -> dict[str, Tensor]:
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=12))
    backbone = pretrained.backbone.freeze()
    torch.manual_seed(0)
    method = build_method(name, BackboneShape.of(backbone), 2, options)
    if method.tunes_backbone:
        backbone.unfreeze_above(0)
    model = MultiplexedClassifier(backbone, method, prefill)
    optim = OptimConfig(epochs=2, batch_size=16, learning_rate=1e-3)
    running = Trainer(model, split(pretrained, rows[:60]), split(pretrained, rows[60:]), optim, LossConfig())
    reports = list(running.run())
    figures = torch.tensor([[report.metrics["train_loss"], report.metrics["selection_accuracy"]] for report in reports])
    return running.trained_weights() | {"figures": figures}


def loss_curve(folder: str, rows: list[dict[str, str]], accumulate: int, negatives: Negatives) -> Tensor:
    """Return the losses of 50 steps of 64 inputs, averaged over the workers."""
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=12))
    backbone = pretrained.backbone.freeze()
    torch.manual_seed(0)
    model = MultiplexedClassifier(
        backbone, build_method("revmux", BackboneShape.of(backbone), 2, {"own_state": "linear"}), 1
    )
    losses: list[Tensor] = []
    running = Trainer(
        model,
        split(pretrained, rows * 2),  # 160 rows: the last step of an epoch is filled up
        split(pretrained, rows[:16]),
        OptimConfig(epochs=17, batch_size=64, learning_rate=1e-3, accumulate=accumulate),
        LossConfig(infonce_weight=0.5, negatives=negatives),
        on_step=lambda step, total, metrics: losses.append(metrics["loss"]),
    )
    list(running.run())
    return mean_over_workers(torch.stack(losses[:50]))


@pytest.mark.parametrize(
    ("workers", "accumulate", "negatives"), [(2, 1, "batch"), (2, 4, "batch"), (2, 1, "group"), (3, 4, "batch")]
)
def test_several_workers_follow_the_loss_curve_of_one(
    workers: int, accumulate: int, negatives: Negatives, run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    """Three workers have 11, 11 and 10 of the 32 groups of a step."""
    alone = loss_curve(str(tiny_model_folder), tiny_rows, 1, negatives)
    assert alone[-1] < 0.8 * alone[0], "the loss must decrease"
    for curve in run_workers(loss_curve, workers, str(tiny_model_folder), tiny_rows, accumulate, negatives):
        assert_close(curve, alone, layers=50)  # one per step


@pytest.mark.parametrize(
    ("name", "prefill", "options"),
    [("revmux", 1, {"tune_backbone": True, "exit_layer": 2}), ("datamux", 0, {})],
)
def test_two_workers_tune_a_backbone_with_unused_weights(
    name: str, prefill: int, options: dict, run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    first, second = run_workers(trained, 2, str(tiny_model_folder), tiny_rows, name, prefill, options)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[weight]) for weight, value in first.items())


def frozen_and_trained(folder: str, rows: list[dict[str, str]]) -> list[float]:
    """Sums of the weights after a trainer was made, where each worker started with other ones."""
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=12))
    backbone = pretrained.backbone.freeze()
    model = MultiplexedClassifier(backbone, build_method("revmux", BackboneShape.of(backbone), 2, {}), 1)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(float(rank_and_world()[0]))
    data = split(pretrained, rows)
    Trainer(model, data, data, OptimConfig(epochs=1, batch_size=8), LossConfig())
    return [float(sum(value.sum() for value in part.parameters())) for part in (model.backbone, model.method)]


def test_workers_share_the_weights_that_are_trained_and_send_no_frozen_ones(
    run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    (first, trained), (second, also_trained) = run_workers(frozen_and_trained, 2, str(tiny_model_folder), tiny_rows)
    assert first == 0.0 < second
    assert trained == also_trained == 0.0
