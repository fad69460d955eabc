"""One batch through the layers of several models on one base equals a batch for each model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny_models import tiny_classifier

from revmux.backbone import Backbone, cut
from revmux.backbone.joint_layers import JointLayers, fits_joint_layers, low_rank_maps
from revmux.backbone.low_rank import LowRankFactors, updated_model

pytestmark = pytest.mark.numeric

TOKENS = {
    "input_ids": torch.tensor([[3, 7, 5, 9], [4, 6, 8, 0], [9, 9, 2, 3]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
}


def updated(base: Backbone, rank: int, layers: range, seed: int) -> Backbone:
    """A model with random updates of the first two linear maps of some layers."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    names = {id(module): name for name, module in base.model.named_modules()}
    for index in layers:
        maps = [
            module for module in base.layer(index).modules() if hasattr(module, "weight") and module.weight.ndim == 2
        ]
        for module in maps[:2]:
            is_linear = isinstance(module, torch.nn.Linear)
            outputs, inputs = module.weight.shape if is_linear else module.weight.shape[::-1]
            down = 0.3 * torch.randn(rank, inputs, generator=generator)
            updates[names[id(module)]] = LowRankFactors(down, torch.randn(outputs, rank, generator=generator))
    return cut(updated_model(base.model, base.config, updates, {})).freeze()


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_each_input_has_the_updates_of_its_own_model(family: str) -> None:
    base = tiny_classifier(family, pad_token_id=0).freeze()
    models = [updated(base, 2, range(1, 3), 0), updated(base, 3, range(2, 3), 1), base]
    state = base.run(base.embed(TOKENS), 1)
    rows = [0, 1, 0, 2]
    order = torch.tensor([2, 0, 1, 1])
    found = JointLayers(base.model).run(state.take(order), [low_rank_maps(models[row]) for row in rows])
    assert found.depth == base.num_layers
    for place, row in enumerate(rows):
        one = state.take(order[place : place + 1])
        expected = models[row].run(one, base.num_layers)
        mask = one.mask[0]
        assert_close(found.hidden[place][mask], expected.hidden[0][mask])
    assert not torch.allclose(found.hidden[2][state.mask[1]], found.hidden[3][state.mask[1]], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "fits"),
    [
        ("bert", {}, True),
        ("gpt2", {}, True),
        ("llama", {}, True),
        ("deberta-v2", {}, True),
        # Its layers apply their linear maps to relative positions, too.
        ("deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}, False),
    ],
)
def test_models_fit_if_their_layers_read_states_of_inputs_alone(
    family: str, settings: dict[str, Any], fits: bool
) -> None:
    base = tiny_classifier(family, pad_token_id=0, **settings).freeze()
    one = {name: tensor[:1] for name, tensor in TOKENS.items()}
    assert fits_joint_layers(updated(base, 2, range(3), 0), one) == fits


def test_a_model_with_an_update_in_the_embedding_does_not_fit() -> None:
    base = tiny_classifier("electra", pad_token_id=0, embedding_size=16).freeze()
    one = {name: tensor[:1] for name, tensor in TOKENS.items()}
    name = "electra.embeddings_project"
    factors = LowRankFactors(torch.ones(2, 16), torch.ones(32, 2))
    embedded = cut(updated_model(base.model, base.config, {name: factors}, {})).freeze()
    assert not fits_joint_layers(embedded, one)
    assert fits_joint_layers(updated(base, 2, range(3), 0), one)
