"""Counted operations, compared with what PyTorch counts."""

import pytest
import torch
from estimated_models import on_meta, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.backbone import supported_model_types
from revmux.estimate.fake import call_with_fake_weights, fake_tensors
from revmux.estimate.flops import count_flops, relative_cost, rival_exit_layer, speedup_ceiling
from revmux.estimate.memory import estimate_memory
from revmux.estimate.shapes import meta_backbone

pytestmark = pytest.mark.numeric

SYSTEMS = [
    ("siso", 1, {}),
    ("exit-head", 1, {"layer": 2}),
    ("revmux", 2, {}),
    ("revmux", 4, {"own_state": "linear", "exit_layer": 2}),
    ("vanilla-adapter", 2, {}),
    ("only-multiplexer-reversible", 4, {}),
    ("datamux", 2, {}),
    ("datamux", 4, {"keys": "orthogonal", "demultiplexer": "mlp"}),
    ("mux-plm", 4, {}),
    ("mux-plm", 2, {"multiplexer": "contextual"}),
    ("token-split", 4, {}),
]
GROUPS, LENGTH = 2, 24


def counted_by_torch(model: MultiplexedClassifier, length: int, group_count: int = GROUPS) -> float:
    """Return the operations per input that FlopCounterMode counts when the model runs."""
    model.requires_grad_(False)
    rows = group_count * model.num_inputs
    ids = torch.full((rows, length), 2)  # 2 is BART's end of text
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    groups = torch.arange(rows).view(group_count, -1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.run_tokens(tokens, groups)
    return counter.get_total_flops() / rows


@pytest.mark.parametrize(("name", "num_inputs", "options"), SYSTEMS)
@pytest.mark.parametrize("prefill_layers", [0, 1])
def test_counts_agree_with_torch(name, num_inputs, options, prefill_layers):
    backbone = tiny("bert")
    method = build_method(name, BackboneShape.of(backbone), num_inputs, options).eval()
    counted = count_flops(backbone, method, prefill_layers, LENGTH).per_input
    expected = counted_by_torch(MultiplexedClassifier(backbone, method, prefill_layers).eval(), LENGTH)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", supported_model_types())
@pytest.mark.parametrize("name", ["revmux", "token-split"])
def test_counts_agree_with_torch_for_every_family(family, name):
    backbone = tiny(family)
    method = build_method(name, BackboneShape.of(backbone), 2).eval()
    if family == "bart" and name == "token-split":
        with pytest.raises(UserError, match="decoder also reads the text"):
            count_flops(backbone, method, 1, LENGTH)
        return
    counted = count_flops(backbone, method, 1, LENGTH).per_input
    # DeBERTa projects its relative positions once per batch, so in a large batch the cost per input vanishes.
    group_count = 32 if family == "deberta-v2" else GROUPS
    expected = counted_by_torch(MultiplexedClassifier(backbone, method, 1).eval(), LENGTH, group_count)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize(("name", "num_inputs", "options"), [("exit-head", 1, {"layer": 2}), ("mux-plm", 2, {})])
def test_counts_of_the_other_methods_agree_with_torch(family, name, num_inputs, options):
    backbone = tiny(family)
    method = build_method(name, BackboneShape.of(backbone), num_inputs, options).eval()
    counted = count_flops(backbone, method, 1, LENGTH).per_input
    expected = counted_by_torch(MultiplexedClassifier(backbone, method, 1).eval(), LENGTH)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "num_inputs", "options"), SYSTEMS)
def test_counts_agree_with_torch_at_bert_base_shape(bert_base, name, num_inputs, options):
    method = on_meta(bert_base, name, num_inputs, options)
    prefill_layers = min(6, method.exit_layer())
    model = MultiplexedClassifier(bert_base, method, prefill_layers).eval()
    with fake_tensors():
        expected = call_with_fake_weights(model, lambda: counted_by_torch(model, 128))
    counted = count_flops(bert_base, method, prefill_layers, 128).per_input
    assert counted == pytest.approx(expected, rel=0.01)
    assert all(parameter.is_meta for parameter in bert_base.parameters())


@pytest.mark.parametrize(("prefill_layers", "speedup"), [(6, 1.31), (3, 1.55)])
def test_revmux_is_faster_than_siso_by_count(bert_base, prefill_layers, speedup):
    cost = relative_cost(bert_base, on_meta(bert_base, "revmux", 2), prefill_layers, 128)
    assert 1 / cost >= speedup
    assert 1 / cost < speedup_ceiling(12, prefill_layers, 2)


def test_siso_costs_one_and_an_exit_head_the_share_of_its_layers(bert_base):
    assert relative_cost(bert_base, on_meta(bert_base, "siso", 1), 0, 128) == pytest.approx(1.0)
    exit_head = on_meta(bert_base, "exit-head", 1, {"layer": 3})
    assert relative_cost(bert_base, exit_head, 0, 128) == pytest.approx(3 / 12, rel=0.01)


def test_the_stages_sum_to_the_total():
    backbone = tiny("bert")
    method = build_method("revmux", BackboneShape.of(backbone), 2)
    cost = count_flops(backbone, method, 1, LENGTH)
    assert cost.per_input == cost.prefill + cost.multiplex + cost.upper + cost.head
    assert cost.upper == pytest.approx(cost.prefill)  # one layer alone, two layers shared by two


@pytest.mark.parametrize("family", sorted({*supported_model_types()} - {"deberta-v2"}))  # which has one kernel only
def test_the_attention_kernel_does_not_change_the_count(family):
    backbone = tiny(family)
    method = build_method("revmux", BackboneShape.of(backbone), 2)
    counted = count_flops(backbone, method, 1, LENGTH)
    backbone.config._attn_implementation = "sdpa" if backbone.config._attn_implementation == "eager" else "eager"
    assert count_flops(backbone, method, 1, LENGTH) == counted


def test_matrix_products_outside_modules_are_counted(monkeypatch):
    backbone = tiny("bert")
    method = build_method("siso", BackboneShape.of(backbone), 1)
    before = count_flops(backbone, method, 1, LENGTH)

    monkeypatch.setattr(type(method), "demultiplex", lambda self, answers, own: answers @ torch.ones(64, 64))
    after = count_flops(backbone, method, 1, LENGTH)
    assert after.head == before.head + 2 * 64 * 64
    assert (after.prefill, after.multiplex, after.upper) == (before.prefill, before.multiplex, before.upper)


def test_counting_leaves_a_model_in_another_thread_alone(monkeypatch):
    """A server counts an adapter's cost while its model runs, so no hook may reach modules in other threads."""
    from torch.nn.modules import module as modules

    seen = []
    run_tokens = MultiplexedClassifier.run_tokens

    def watched(self, *arguments):
        seen.append(len(modules._global_forward_hooks) + len(modules._global_forward_pre_hooks))
        return run_tokens(self, *arguments)

    monkeypatch.setattr(MultiplexedClassifier, "run_tokens", watched)
    backbone = tiny("bert").train()
    count_flops(backbone, build_method("revmux", BackboneShape.of(backbone), 2), 1, LENGTH)
    assert seen == [0]
    assert backbone.training


@pytest.mark.parametrize(
    ("num_layers", "prefill_layers", "num_inputs", "ceiling"),
    [
        (12, 3, 2, 1.60),
        (12, 3, 4, 2.29),
        (12, 3, 8, 2.91),
        (12, 6, 2, 1.33),
        (12, 6, 8, 1.78),
        (12, 1, 8, 5.05),
        (12, 0, 4, 4),
    ],
)
def test_the_ceiling_is_the_speedup_with_free_adapters(num_layers, prefill_layers, num_inputs, ceiling):
    assert speedup_ceiling(num_layers, prefill_layers, num_inputs) == pytest.approx(ceiling, abs=0.005)


def test_the_ceiling_of_an_early_exit_counts_the_layers_that_run():
    assert speedup_ceiling(12, 0, 1, exit_layer=3) == 4
    assert speedup_ceiling(12, 3, 2, exit_layer=6) == pytest.approx(24 / 9)
    assert speedup_ceiling(12, 0, 1, exit_layer=0) == float("inf")


@pytest.mark.parametrize(("name", "valid"), [("revmux", 64), ("datamux", 61)])
def test_a_length_beyond_the_position_embeddings_is_refused(name, valid):
    backbone = tiny("bert")
    method = build_method(name, BackboneShape.of(backbone), 2)
    message = f"the backbone accepts at most 64; truncate texts to {valid}"
    with pytest.raises(UserError, match=message):
        count_flops(backbone, method, 1, 65)
    with pytest.raises(UserError, match=message):
        estimate_memory(backbone, method, 1, 4, 65)


def test_the_compared_exit_layer_is_the_deepest_one_that_costs_no_more() -> None:
    backbone = meta_backbone("bert-base")
    method = build_method("revmux", BackboneShape.of(backbone), 2)
    layer = rival_exit_layer(backbone, method, 6, 128)
    cost = relative_cost(backbone, method, 6, 128)
    assert layer / backbone.num_layers <= cost < (layer + 1) / backbone.num_layers
