"""LoRA above the cut: the same answers as merged weights, in the method's passes only."""

import copy

import pytest
import torch
from numeric import assert_close
from tiny_models import tiny_classifier

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.backbone import Backbone
from revmux.estimate.flops import count_flops
from revmux.estimate.memory import estimate_memory
from revmux.methods.lora import SCALE, UpdatedLinear

pytestmark = pytest.mark.numeric

OPTIONS = {"up": "inverse", "own_state": "mlp", "lora_rank": 3}
FAMILIES = ["bert", "distilbert", "electra", "gpt2", "llama"]


def tokens(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, 7), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def model_on(backbone: Backbone, seed: int = 0, options: dict = OPTIONS) -> MultiplexedClassifier:
    torch.manual_seed(seed)
    model = MultiplexedClassifier(backbone, build_method("revmux", BackboneShape.of(backbone), 2, options), 1)
    for parameter in model.method.parameters():
        parameter.data.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_pass_equals_one_with_merged_weights(family):
    backbone = tiny_classifier(family)
    model = model_on(backbone)
    merged = copy.deepcopy(backbone)
    for index, updates in zip(range(1, backbone.num_layers), model.method.lora.layers):
        for key, update in updates.items():
            weight = merged.layer(index).get_submodule(key.replace("-", ".")).weight
            change = SCALE * update.up @ update.down
            weight += change if weight.shape == change.shape and family != "gpt2" else change.T
    prefilled = model.prefill(tokens())
    mixed = model.multiplex(prefilled, torch.tensor([[0, 1], [2, 3]]))
    assert_close(model.upper(mixed).hidden, merged.run(mixed, backbone.num_layers).hidden)
    assert not torch.allclose(model.upper(mixed).hidden, backbone.run(mixed, backbone.num_layers).hidden, atol=1e-3)


@torch.no_grad()
def test_the_plain_model_stays_exact_and_two_adapters_share_a_backbone():
    backbone = tiny_classifier("bert")
    before, modules = backbone(tokens()), [type(module) for module in backbone.modules()]
    first, second = model_on(backbone, 1), model_on(backbone, 2)
    alone = first(tokens())
    second(tokens())
    assert torch.equal(backbone(tokens()), before)
    assert torch.equal(first(tokens()), alone)
    assert not torch.allclose(second(tokens()), alone)
    assert [type(module) for module in backbone.modules()] == modules
    shared = dict(first.upper_backbone.named_parameters())
    assert all(
        shared[name.replace(".weight", ".base.weight")] is weight
        for name, weight in backbone.named_parameters()
        if name.endswith("layer.2.attention.self.query.weight")
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_updates_give_the_same_answers_and_leave_the_plain_model_exact(family):
    backbone = tiny_classifier(family)
    before = backbone(tokens())
    model = model_on(backbone)
    apart = model(tokens())
    model.merge_lora(limit=model.method.lora.merged_bytes(backbone))
    assert not any(isinstance(module, UpdatedLinear) for module in model.upper_backbone.modules())
    assert_close(model(tokens()), apart)
    assert torch.equal(backbone(tokens()), before)
    own, merged = (dict(one.named_parameters()) for one in (backbone, model.upper_backbone))
    copied = [name for name in own if own[name] is not merged[name]]
    assert sum(own[name].nbytes for name in copied) == model.method.lora.merged_bytes(backbone)
    assert len(copied) == sum(len(updates) for updates in model.method.lora.layers)


@torch.no_grad()
def test_updates_stay_apart_in_training_and_where_the_copy_is_too_large():
    backbone = tiny_classifier("bert")
    model = model_on(backbone)
    model.merge_lora(limit=model.method.lora.merged_bytes(backbone) - 1)
    assert any(isinstance(module, UpdatedLinear) for module in model.upper_backbone.modules())
    model.merge_lora(limit=model.method.lora.merged_bytes(backbone))
    assert any(isinstance(module, UpdatedLinear) for module in model.train().upper_backbone.modules())
    model_on(backbone, options=OPTIONS | {"lora_rank": 0}).merge_lora(limit=10**9)  # nothing to merge


@torch.no_grad()
def test_updates_start_at_zero():
    backbone = tiny_classifier("bert")
    torch.manual_seed(0)
    plain = build_method("revmux", BackboneShape.of(backbone), 2, OPTIONS | {"lora_rank": 0})
    torch.manual_seed(0)
    updated = build_method("revmux", BackboneShape.of(backbone), 2, OPTIONS)
    expected, found = (MultiplexedClassifier(backbone, method, 1).eval()(tokens()) for method in (plain, updated))
    assert_close(found, expected)


def test_gradients_reach_the_updates_above_the_cut_and_no_frozen_weight():
    backbone = tiny_classifier("bert").freeze()
    model = model_on(backbone).train()
    model(tokens()).square().sum().backward()
    layers = model.method.lora.layers
    assert len(layers) == backbone.num_layers - 1
    assert all(weight.grad is not None and weight.grad.any() for weight in layers.parameters())
    assert all(weight.grad is None for weight in backbone.parameters())


def test_the_updates_are_counted():
    backbone = tiny_classifier("bert")
    without, updated = model_on(backbone, options=OPTIONS | {"lora_rank": 0}), model_on(backbone)
    factors = sum(weight.numel() for weight in updated.method.lora.parameters())
    assert updated.method.tunable_parameters() == without.method.tunable_parameters() + factors
    base, more = (count_flops(backbone, model.method, 1, 7) for model in (without, updated))
    # Two operations per weight and token, for one shared sequence of 7 tokens per 2 inputs.
    assert more.upper - base.upper == pytest.approx(2 * factors * 7 / 2)
    needed = [estimate_memory(backbone, model.method, 1, 4, 7, torch.float32) for model in (without, updated)]
    assert needed[1].adapters - needed[0].adapters == 4 * factors
    assert needed[1].activations > needed[0].activations
    again = estimate_memory(backbone, updated.method, 1, 4, 7, torch.float32, gradient_checkpointing=True)
    assert again.activations < needed[1].activations, (
        "the layers' frozen weights are no activations in the second count"
    )


def test_an_exit_head_updates_the_layers_between_the_cut_and_the_exit():
    backbone = tiny_classifier("bert")
    method = build_method("exit-head", BackboneShape.of(backbone), 1, {"layer": 2, "lora_rank": 2})
    model = MultiplexedClassifier(backbone, method, 1)
    assert (method.lora.first, method.lora.last) == (1, 2)
    assert model(tokens()).shape == (4, backbone.num_labels)
    with pytest.raises(ValueError, match="LoRA belongs to layers"):
        MultiplexedClassifier(backbone, method, 0)


def test_attention_pooling_starts_as_the_mean():
    backbone = tiny_classifier("bert")
    scores = []
    for pooled in (False, True):
        torch.manual_seed(0)
        method = build_method("exit-head", BackboneShape.of(backbone), 1, {"layer": 2, "attention_pooling": pooled})
        scores.append(MultiplexedClassifier(backbone, method, 2).eval()(tokens()))
    assert_close(scores[0], scores[1])


def test_the_attention_of_a_correction_starts_as_the_mean_and_then_picks_tokens():
    backbone = tiny_classifier("bert")
    method = build_method("revmux", BackboneShape.of(backbone), 2, {"own_state": "attention"})
    batch = tokens()
    with torch.no_grad():
        state = backbone.run(backbone.embed(batch), 1)
        assert_close(method.own_states(backbone, state), backbone.own_states(state))
        direction = torch.randn(backbone.hidden_size)
        method.own_state.attention.weight.copy_(1e4 * direction)
        picked = method.own_states(backbone, state)[:, backbone.hidden_size :]
        relevance = (state.hidden @ direction).masked_fill(~state.mask, -torch.inf)
        assert_close(picked, state.hidden[torch.arange(len(state)), relevance.argmax(dim=1)])


def test_lora_and_a_tuned_backbone_exclude_each_other():
    backbone = tiny_classifier("bert")
    method = build_method("revmux", BackboneShape.of(backbone), 2, {"lora_rank": 2, "tune_backbone": True})
    with pytest.raises(UserError, match="lora_rank is 2, but tune_backbone"):
        MultiplexedClassifier(backbone, method, 1)
