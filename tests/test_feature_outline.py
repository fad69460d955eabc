"""A backbone without weights finds what its stores lack, if their hash and a probe are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from feature_stores import small_store
from tiny_models import LABELS, TEMPLATE, WORDS, write_language_model, write_tiny_model

from revmux import BackboneConfig
from revmux.features.budget import probe
from revmux.features.key import backbone_digest
from revmux.features.store import StoreBuilder
from revmux.pretrained.loading import load_outline, load_pretrained

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_an_outline_plans_the_same_feature_pass(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if family == "bert":
        config = BackboneConfig(str(write_tiny_model(folder)), max_length=16)
    else:
        prompt = tmp_path / "prompt.yaml"
        prompt.write_text(f'template: "{TEMPLATE[0]} {{text}} {TEMPLATE[2]}"\nlabels: {{a: [w1], b: [w2]}}\n')
        config = BackboneConfig(str(write_language_model(folder, family)), max_length=24, prompt=str(prompt))
    texts = [" ".join(WORDS[: 1 + index % 9]) for index in range(23)]
    data = Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    whole, outline = load_pretrained(config, LABELS), load_outline(config, LABELS)
    assert {tensor.device.type for tensor in outline.backbone.state_dict().values()} == {"meta"}
    assert outline.backbone.label_names == whole.backbone.label_names
    assert outline.identity == whole.identity
    split = whole.tokenize(data, config.max_length)
    whole.backbone.freeze()
    outline.backbone.freeze()
    known = {"weights": backbone_digest(whole.backbone), "probed": probe(whole.backbone, split)}
    store = small_store(tmp_path)
    loaded = StoreBuilder(whole, split, [1, 2], store)
    planned = StoreBuilder(outline, split, [1, 2], store, **known)
    assert planned.key == loaded.key
    assert not planned.complete()
    with planned.filling() as todo:
        assert (len(todo.missing), sorted(todo.layers)) == (3, [1, 2])
        todo.write(whole.backbone, split)
    assert planned.complete()
    assert torch.equal(loaded.open().at(2).batch([3]).labels, split.labels[[3]])
