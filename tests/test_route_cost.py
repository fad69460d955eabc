"""The cost of an adapter is counted once per architecture, whatever the weights and the names of the classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import BertForSequenceClassification

from revmux.backbone import cut
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.serving import route_cost
from revmux.serving.route_cost import route_of

pytestmark = pytest.mark.numeric


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[MultiplexedClassifier]:
    """The models whose cost was counted."""
    found: list[MultiplexedClassifier] = []
    count = route_cost._count
    monkeypatch.setattr(route_cost, "_counted", {})
    monkeypatch.setattr(route_cost, "_count", lambda model: found.append(model) or count(model))
    return found


def classifier(
    labels: str = "ab", num_inputs: int = 2, depth: int = 1, layers: int = 3, method: str = "revmux", **options: Any
) -> MultiplexedClassifier:
    names = dict(enumerate(labels))
    config = tiny_config("bert", id2label=names, label2id={name: index for index, name in names.items()})
    config.num_hidden_layers = layers
    backbone = cut(BertForSequenceClassification(config)).freeze()
    return MultiplexedClassifier(backbone, build_method(method, BackboneShape.of(backbone), num_inputs, options), depth)


def test_tasks_of_one_architecture_are_counted_once(counts: list[MultiplexedClassifier]) -> None:
    torch.manual_seed(0)
    assert route_of(classifier("ab")) == route_of(classifier("cd"))
    assert len(counts) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"labels": "abc"},
        {"num_inputs": 4},
        {"depth": 2},
        {"layers": 4},
        {"method": "token-split"},
        {"lora_rank": 2},
    ],
)
def test_whatever_changes_the_operations_is_counted_again(
    other: dict[str, Any], counts: list[MultiplexedClassifier]
) -> None:
    first, second = classifier(), classifier(**other)
    assert route_of(first) != route_of(second)
    assert counts == [first, second]
