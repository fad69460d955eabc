"""The tasks of the LLaMA benchmark: the calibrated model, the teacher, and sentences that have only the teacher's answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.comparison.systems import Ready
from benchmarks.rows import kept_rows
from benchmarks.trained import tuned_task_model
from revmux.data.config import DataConfig
from revmux.data.prompt import load_prompt
from revmux.data.task import TaskData, load_task
from revmux.features.config import StoreConfig
from revmux.features.store import open_features
from revmux.plan.build import for_choosing
from revmux.plan.config import SplitConfig
from revmux.pretrained.calibration import calibrated, fit_bias, label_scores
from revmux.pretrained.config import SMOLLM2_NAME, BackboneConfig, Dtype
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import OptimConfig

KEPT = Path("runs/llama")
TEACHERS = ("tuned", "calibrated")
"""tuned: the upper half of the layers, tuned on labelled sentences. calibrated: the released model with a bias per word."""
CALIBRATION, SELECTION, CHOOSING = 300, 200, 400
"""Inputs that fit the bias, that select the best epoch, and on which the ladders choose their thresholds."""


@dataclass(frozen=True)
class LlamaTask:
    """One task and how much is trained on it.

    Attributes:
        name: name of the task and of its folder in GLUE.
        prompt: name of a shipped prompt.
        teacher: which of :data:`TEACHERS` the adapters stand on.
        max_length: tokens to which an input is truncated.
        labelled: inputs whose labels are used: for calibration, the tuned teacher and SISO's own tuning.
        unlabelled: other inputs, which adapters learn with the teacher's answers.
        selection_share: share of the train split that is held out.
    """

    name: str
    prompt: str
    teacher: str
    max_length: int
    labelled: int
    unlabelled: int
    selection_share: float = 0.1


TASKS = {
    task.name: task
    for task in (
        LlamaTask("SST-2", "sst2-few-shot", "calibrated", 128, 2000, 6000, 0.03),
        LlamaTask("MRPC", "mrpc", "tuned", 256, 700, 700),
        LlamaTask("RTE", "rte", "tuned", 384, 500, 500),
    )
}


@dataclass(frozen=True)
class Taught:
    """A task with both of its frozen models.

    Attributes:
        teacher: which of :data:`TEACHERS` the adapters stand on.
        labelled: the calibrated model with labelled inputs, on which SISO's own tuning stands.
        unlabelled: the teacher with inputs that have its answers in place of labels. Only the test split has labels.
        answers: (M,) the teacher's classes of the test split.
        bias: (C,) the calibration of the label words.
    """

    teacher: str
    labelled: Ready
    unlabelled: Ready
    answers: Tensor
    bias: Tensor


def taught(
    spec: LlamaTask,
    glue: Path,
    layers: list[int],
    limit: int | None = None,
    model: str = SMOLLM2_NAME,
    dtype: Dtype = "bfloat16",
) -> Taught:
    """Load a task, calibrate the model, tune the teacher and store its answers, unless that has been done.

    Args:
        spec: the task.
        glue: folder of GLUE.
        layers: the layers whose states are stored.
        limit: most inputs of every split, for a quick run.
        model: the language model.
        dtype: type of the frozen weights and of the stored states.
    """
    folder = KEPT / (spec.name if limit is None else f"{spec.name}-limit-{limit}")
    data = DataConfig(str(glue / spec.name), selection_share=spec.selection_share)
    names = list(load_prompt(spec.prompt).labels)
    task = load_task(data, names)
    choosing = for_choosing(task, SplitConfig(0.1, CHOOSING))
    train = choosing.train.shuffle(seed=0)
    known = min(spec.labelled, limit or spec.labelled)
    labelled = _first(train, known)
    unlabelled = train.select(range(known, min(len(train), known + min(spec.unlabelled, limit or spec.unlabelled))))
    own = replace(
        choosing,
        train=labelled,
        selection=_first(task.selection, min(SELECTION, limit or SELECTION)),
        test=_first(choosing.test, limit),
    )
    task = replace(own, test=_first(task.test, limit))
    store = StoreConfig(root=str(folder / "features"), dtype=dtype)
    plain = BackboneConfig(model, max_length=spec.max_length, dtype=dtype, prompt=spec.prompt)
    settings = (plain, own.identity["sha256"], len(labelled))
    bias = kept_rows(folder, "calibration", settings, partial(_calibration, plain, own))
    prompt = calibrated(load_prompt(spec.prompt), names, bias)
    base = replace(plain, prompt=prompt)
    depth = load_pretrained(plain, names).backbone.num_layers
    own = _with_identity(own, "labelled")
    tuned = base
    if spec.teacher == "tuned":
        optim = OptimConfig(1, 16, 1e-4, precision="float32" if dtype == "float32" else "bfloat16")
        found = tuned_task_model(replace(base, dtype="float32"), data, own, optim, depth // 2, folder)
        tuned = BackboneConfig(str(found), max_length=spec.max_length, dtype=dtype)
    answered, answers = _answered(replace(own, train=unlabelled), task.test, tuned, layers, store)
    return Taught(
        spec.teacher,
        Ready(spec.name, task, own, data, base, store, folder / "labelled"),
        Ready(spec.name, task, answered, data, tuned, store, folder / spec.teacher),
        answers,
        torch.tensor(bias),
    )


def _first(split: Dataset, count: int | None) -> Dataset:
    return split if count is None else split.select(range(min(count, len(split))))


def _calibration(config: BackboneConfig, task: TaskData) -> list[float]:
    pretrained = load_pretrained(config, task.label_names)
    pretrained.backbone.freeze()
    split = _first(task.train, CALIBRATION)
    return fit_bias(label_scores(pretrained, split, config.max_length), torch.tensor(split["label"]))


def _with_identity(task: TaskData, kind: str) -> TaskData:
    """The task with an identity that depends on the texts and labels that are used."""
    digest = hashlib.sha256(f"{task.identity['sha256']} {kind}".encode())
    for split in (task.train, task.selection, task.test):
        digest.update(repr((split["text"], split["label"])).encode())
    sizes = {name: len(getattr(task, name)) for name in ("train", "selection", "test")}
    return replace(task, identity=task.identity | sizes | {"sha256": digest.hexdigest()})


def _answered(
    task: TaskData, test: Dataset, teacher: BackboneConfig, layers: list[int], store: StoreConfig
) -> tuple[TaskData, Tensor]:
    """The task with the teacher's answers in place of labels, and its answers to the test split; fills the stores."""
    pretrained = load_pretrained(teacher, task.label_names)
    pretrained.backbone.freeze()

    def answers(split: Dataset) -> Tensor:
        tokens = pretrained.tokenize(split, teacher.max_length)
        features = open_features(pretrained, tokens, layers, store).with_tokens()
        scores = [features.batch(rows).teacher_scores for rows in torch.arange(len(tokens)).split(256)]
        return torch.cat([each.argmax(-1) for each in scores if each is not None])

    def relabelled(split: Dataset) -> Dataset:
        given: Dataset = split.remove_columns("label").add_column("label", answers(split).tolist())
        return given

    changed = replace(
        task, train=relabelled(task.train), selection=relabelled(task.selection), test=relabelled(task.test)
    )
    return _with_identity(changed, "answers of the teacher"), answers(test)
