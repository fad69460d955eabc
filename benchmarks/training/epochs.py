"""An epoch on stored features against the same epoch without the store: as in the released code, and online."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import ratio_row
from benchmarks.training.backbones import Timed, timed_backbones
from benchmarks.training.released import ReleasedModel, ReleasedTraining
from revmux.features.base import Features
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.grouping import epoch_groups
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.trainer import Trainer

BATCH, RATE = 32, 5e-4
INPUTS = {"all-MiniLM-L6-v2": 480, "bert-base shape, random": 96}
WIDTHS = {"all-MiniLM-L6-v2": (2, 4), "bert-base shape, random": (2,)}
PAIRS = 3
SETTINGS = (BATCH, RATE, INPUTS, WIDTHS, PAIRS)


def epochs_of(timed: Timed, num_inputs: int, layer: int, features: Features, epochs: int) -> Iterator[float]:
    """Yield the seconds of each epoch of our trainer."""
    torch.manual_seed(0)
    backbone = timed.pretrained.backbone
    method = build_method("revmux", BackboneShape.of(backbone), num_inputs)
    model = MultiplexedClassifier(backbone, method, layer)
    few = OnlineFeatures(timed.few, backbone)
    trainer = Trainer(model, features, few, OptimConfig(epochs, BATCH, RATE), LossConfig())
    for report in trainer.run():
        yield trainer.steps_per_epoch / report.metrics["steps_per_second"]


def released_epochs(timed: Timed, num_inputs: int, layer: int, epochs: int) -> Iterator[float]:
    """Yield the seconds of each epoch with the released code's step, on a backbone copy that requires gradients."""
    torch.manual_seed(0)
    backbone = copy.deepcopy(timed.pretrained.backbone).requires_grad_(True)
    method = build_method("revmux", BackboneShape.of(backbone), num_inputs)
    training = ReleasedTraining(ReleasedModel(backbone, method, layer), timed.split, LossConfig(), RATE)
    for epoch in range(epochs):
        yield training.epoch(schedule_of(timed, num_inputs, epoch))


def schedule_of(timed: Timed, num_inputs: int, epoch: int) -> Tensor:
    """Return the groups that the trainer forms in this epoch."""
    return epoch_groups(timed.split.lengths, num_inputs, BATCH // num_inputs, 0, epoch)


def compare(timed: Timed, num_inputs: int, pairs: int) -> Iterator[dict[str, Any]]:
    """Yield rows of one backbone at one N; variants alternate by epoch, and the first epoch of each does not count."""
    backbone, layer = timed.pretrained.backbone, timed.pretrained.backbone.num_layers // 2
    with tempfile.TemporaryDirectory() as folder:
        stored = open_features(timed.pretrained, timed.split, [layer], StoreConfig(root=folder))
        kinds: dict[str, Callable[[], Iterator[float]]] = {
            "store": lambda: epochs_of(timed, num_inputs, layer, stored.at(layer), pairs + 1),
            "released": lambda: released_epochs(timed, num_inputs, layer, pairs + 1),
            "online": lambda: epochs_of(
                timed,
                num_inputs,
                layer,
                OnlineFeatures(timed.split, backbone, prefill_layers=layer),
                pairs + 1,
            ),
            "teacher": lambda: epochs_of(timed, num_inputs, layer, stored.with_tokens(), pairs + 1),
        }
        running = {name: kind() for name, kind in kinds.items()}
        rounds = [{name: next(epochs) for name, epochs in running.items()} for _ in range(pairs + 1)][1:]
    about = {
        "backbone": timed.name,
        "num_inputs": num_inputs,
        "prefill_layers": layer,
        "inputs": len(timed.split),
        "tokens": int(timed.split.lengths.sum()),
    }
    for rival, words, target in (
        ("released", "an epoch as the released code does it / with the store", 5.0),
        ("online", "an epoch with teacher and prefill computed online / with the store", 2.5),
        ("teacher", "an epoch with the teacher stored and the prefill computed online / with the store", None),
    ):
        yield about | ratio_row(words, [times[rival] / times["store"] for times in rounds], target)


def measure() -> list[dict[str, Any]]:
    """Return all rows."""
    rows = []
    for timed in timed_backbones(INPUTS):
        for num_inputs in WIDTHS[timed.name]:
            rows += list(compare(timed, num_inputs, PAIRS))
            print(*(f"{row['name']}: {row['ratio_median']}" for row in rows[-3:]), sep="\n", flush=True)
    return rows
