"""The two timed backbones, and texts for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from revmux.backbone import cut
from revmux.data.config import DataConfig
from revmux.data.task import TaskData, load_task
from revmux.data.tokens import TokenizedSplit
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained

MAX_LENGTH = 64


@dataclass(frozen=True)
class Timed:
    """A backbone with the inputs of one timed epoch.

    Attributes:
        name: name in the rows.
        pretrained: backbone with frozen weights, and tokenizer.
        split: inputs of an epoch.
        few: eight other inputs for the evaluation after each epoch, which is not timed.
    """

    name: str
    pretrained: Pretrained
    split: TokenizedSplit
    few: TokenizedSplit


def small_task(per_class: int = 150) -> TaskData:
    """Return a small version of the embedded task."""
    return load_task(DataConfig("docstrings", per_class=per_class))


def embedded(task: TaskData) -> Pretrained:
    """Return the embedded encoder with a new head."""
    torch.manual_seed(0)
    pretrained = load_pretrained(BackboneConfig(max_length=MAX_LENGTH), task.label_names)
    pretrained.backbone.freeze()
    return pretrained


def bert_base(task: TaskData) -> Pretrained:
    """Return a BERT-base shape with random weights and the embedded encoder's tokenizer."""
    torch.manual_seed(0)
    names = dict(enumerate(task.label_names))
    config = BertConfig(id2label=names, label2id={name: index for index, name in names.items()})
    backbone = cut(AutoModelForSequenceClassification.from_config(config)).freeze()
    identity: dict[str, str | None] = {"name": "bert-base shape, random", "revision": None, "sha256": None}
    return Pretrained(backbone, embedded(task).tokenizer, identity, True)


def timed_backbones(inputs: dict[str, int]) -> Iterator[Timed]:
    """Yield both backbones one after the other, so that only one is in memory.

    Args:
        inputs: number of inputs per epoch, by backbone name.
    """
    task = small_task()
    makers = {"all-MiniLM-L6-v2": embedded, "bert-base shape, random": bert_base}
    for name, make in makers.items():
        pretrained = make(task)
        split = TokenizedSplit(task.train.select(range(inputs[name])), pretrained.tokenizer, MAX_LENGTH)
        few = TokenizedSplit(task.selection.select(range(8)), pretrained.tokenizer, MAX_LENGTH)
        yield Timed(name, pretrained, split, few)
