"""SISO: the model without training, with a bias per word, and tuned on labels in several ways."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.runs import measure_run
from benchmarks.comparison.systems import Ready, System, build_recipe
from benchmarks.llama.systems import BATCH, DEPTH, LEARNING_RATE, RANK, SHUFFLES
from benchmarks.llama.tasks import Taught
from benchmarks.trained import Run
from revmux.adapters.folder import load_adapter
from revmux.estimate.flops import plain_cost
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.features.base import Features
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.methods import method_class
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.plan.config import MeasureConfig
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import MethodConfig, Recipe
from revmux.training.evaluation import predict
from revmux.training.recipe import load_backbone, prepare
from revmux.training.trainer import load_weights
from revmux.utils.files import write_json
from revmux.utils.run_info import git_commit

ZERO_SHOT, CALIBRATED = "SISO, zero-shot", "SISO, calibrated"
VECTORS, SOFT_RATE = 10, 1e-2
"""Length of the soft prompt, and its learning rate."""


def plain_systems() -> Iterator[System]:
    """The released model, which is not trained."""
    for title in (ZERO_SHOT, CALIBRATED):
        yield System(title, MethodConfig("siso", 1, 0))


def labelled_systems() -> Iterator[System]:
    """SISO's own tuning, on the calibrated model and labelled inputs."""
    yield System("SISO, tuned head", MethodConfig("exit-head", 1, DEPTH, {"layer": DEPTH}))
    half = DEPTH // 2
    lora = MethodConfig("exit-head", 1, half, {"layer": DEPTH, "lora_rank": RANK})
    yield System(f"SISO, LoRA above layer {half}", lora)
    yield System("SISO, soft prompt", MethodConfig("siso", 1, 0, {"soft_prompt": VECTORS}))


def labelled_recipe(system: System, ready: Ready, seed: int) -> Recipe:
    """The recipe of one run. A soft prompt runs the whole model for every input, so it gets one epoch."""
    soft = method_class(system.method.name).is_plain
    epochs = 8 if system.method.prefill_layers == DEPTH else 1
    optim = {"batch_size": BATCH, "learning_rate": SOFT_RATE if soft else LEARNING_RATE, "warmup_share": 0.05}
    return build_recipe(system, ready, epochs, seed, SHUFFLES, **optim)


def measure_labelled(run: Run, ready: Ready, threads: int, answers: Tensor, timing: MeasureConfig) -> dict[str, Any]:
    """Train and measure one run on the test split; its agreement is that with the teacher of the other systems.

    Args:
        run: the run.
        ready: the calibrated model and labelled inputs.
        threads: threads of PyTorch.
        answers: (M,) the teacher's classes of the test split.
        timing: how throughput is measured.
    """
    torch.set_num_threads(threads)
    if method_class(run.recipe.method.name).is_plain:
        return _soft_prompt(run, ready, answers, timing)
    figures = measure_run(run, ready, threads, timing)
    pretrained = load_backbone(run.recipe, ready.task.label_names)
    pretrained.backbone.freeze()
    model = load_adapter(figures["adapter"], pretrained)
    split = pretrained.tokenize(ready.task.test, run.recipe.backbone.max_length)
    layer = model.prefill_layers
    features = open_features(pretrained, split, [layer], run.recipe.store).at(layer)
    figures["siso_agreement"] = _agreement(model, features, answers)
    write_json(run.result, figures)
    return figures


def _agreement(model: MultiplexedClassifier, features: Features, answers: Tensor) -> float:
    labels = predict(model.eval(), features, torch.arange(len(features)).unsqueeze(1)).labels
    return float((labels == answers).double().mean())


def _soft_prompt(run: Run, ready: Ready, answers: Tensor, timing: MeasureConfig) -> dict[str, Any]:
    started = time.perf_counter()
    prepared = prepare(run.recipe, ready.choosing)
    trainer = prepared.trainer()
    for _ in trainer.run():
        pass
    load_weights(prepared.model, trainer.best)
    trained = time.perf_counter()
    backbone = prepared.pretrained.backbone.freeze()
    split = prepared.pretrained.tokenize(ready.task.test, run.recipe.backbone.max_length)
    model = plain_classifier(backbone).eval()
    features = OnlineFeatures(split, backbone, with_teacher=False)
    labels = predict(model, features, torch.arange(len(split)).unsqueeze(1)).labels
    without = load_pretrained(ready.backbone, ready.task.label_names).backbone.freeze()
    length = max(1, round(float(split.lengths.double().mean())))
    batches = like_length_batches(split, timing.throughput_inputs, timing.throughput_batch)
    ratio = paired_throughput(plain_classifier(without), model, batches, timing.throughput_pairs)
    figures = {
        "accuracy_mean": float((labels == split.labels).double().mean()),
        "siso_agreement": float((labels == answers).double().mean()),
        "siso_accuracy": None,
        "cost_counted": plain_cost(backbone, length).per_input / plain_cost(without, length).per_input,
        "throughput_ratio": ratio.median,
        "throughput_pairs": asdict(ratio),
        "tunable_params": sum(value.numel() for value in trainer.best.values()),
        "asked": run.asked,
        "commit": git_commit(),
        "seconds": {"train": round(trained - started, 1), "evaluate": round(time.perf_counter() - trained, 1)},
    }
    write_json(run.result, figures)
    return figures


def untrained_rows(found: Taught) -> list[dict[str, Any]]:
    """The rows of the model without training: zero-shot, calibrated and, if it is the teacher, tuned."""
    ready = found.labelled
    pretrained = load_pretrained(ready.backbone, ready.task.label_names)
    pretrained.backbone.freeze()
    split = pretrained.tokenize(ready.task.test, ready.backbone.max_length)
    features = open_features(pretrained, split, [DEPTH // 2, DEPTH], ready.store).with_tokens()
    parts = [features.batch(rows).teacher_scores for rows in torch.arange(len(split)).split(256)]
    scores = torch.cat([each for each in parts if each is not None])
    labels = {ZERO_SHOT: (scores - found.bias).argmax(-1), CALIBRATED: scores.argmax(-1)}
    if found.teacher == "tuned":
        labels[f"SISO, layers above {DEPTH // 2} tuned"] = found.answers
    correct = float((found.answers == split.labels).double().mean())
    return [
        {
            "title": title,
            "method": "siso",
            "recipe": None,
            "lora_rank": 0,
            "num_inputs": 1,
            "prefill_layers": 0,
            "exit_layer": None,
            "fallback": 0,
            "tunable_params": None if "tuned" in title else 0,
            "seeds": 1,
            "accuracy_mean": float((each == split.labels).double().mean()),
            "accuracy_std": None,
            "siso_accuracy": correct,
            "siso_agreement": float((each == found.answers).double().mean()),
            "cost_counted": 1.0,
            "throughput_ratio": 1.0,
        }
        for title, each in labels.items()
    ]
