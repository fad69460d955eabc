"""The two backbones that are timed, and text for them."""

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
    """A backbone with the inputs that one epoch of it takes here.

    Attributes:
        name: in the rows.
        pretrained: with tokenizer; its weights are frozen.
        split: the inputs.
        few: eight others, for the evaluation that ends each epoch and is not timed.
    """

    name: str
    pretrained: Pretrained
    split: TokenizedSplit
    few: TokenizedSplit


def small_task(per_class: int = 150) -> TaskData:
    """Sentences of the embedded task."""
    return load_task(DataConfig(per_class=per_class))


def embedded(task: TaskData) -> Pretrained:
    """The embedded encoder with a fresh head."""
    torch.manual_seed(0)
    pretrained = load_pretrained(BackboneConfig(max_length=MAX_LENGTH), task.label_names)
    pretrained.backbone.freeze()
    return pretrained


def bert_base(task: TaskData) -> Pretrained:
    """A BERT-base shape with random weights and the embedded encoder's tokenizer."""
    torch.manual_seed(0)
    names = dict(enumerate(task.label_names))
    config = BertConfig(id2label=names, label2id={name: index for index, name in names.items()})
    backbone = cut(AutoModelForSequenceClassification.from_config(config)).freeze()
    identity: dict[str, str | None] = {"name": "bert-base shape, random", "revision": None, "sha256": None}
    return Pretrained(backbone, embedded(task).tokenizer, identity, True)


def timed_backbones(inputs: dict[str, int]) -> Iterator[Timed]:
    """Both, one after the other, so that one is in memory at a time.

    Args:
        inputs: how many an epoch takes, by the backbone's name.
    """
    task = small_task()
    makers = {"all-MiniLM-L6-v2": embedded, "bert-base shape, random": bert_base}
    for name, make in makers.items():
        pretrained = make(task)
        split = TokenizedSplit(task.train.select(range(inputs[name])), pretrained.tokenizer, MAX_LENGTH)
        few = TokenizedSplit(task.selection.select(range(8)), pretrained.tokenizer, MAX_LENGTH)
        yield Timed(name, pretrained, split, few)
