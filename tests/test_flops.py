"""Counted operations and estimated memory, compared with what PyTorch counts and keeps."""

import json
import sys
from dataclasses import fields

import pytest
import torch
from tiny_models import tiny_classifier, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method, cut
from revmux.__main__ import main
from revmux.backbone import Backbone, supported_model_types
from revmux.backbone.verbalizer import Verbalizer
from revmux.estimate.fake import call_with_fake_weights, fake_tensors
from revmux.estimate.flops import count_flops, relative_cost, rival_exit_layer, speedup_ceiling
from revmux.estimate.memory import estimate_memory
from revmux.estimate.presets import PRESETS
from revmux.estimate.shapes import config_of, meta_backbone
from revmux.methods import Method, method_class, method_names

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
BERT = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPS, LENGTH = 2, 24


TINY: dict[str, dict] = {
    "bert": {},
    "electra": {"embedding_size": 32},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "share_att_key": True,
        "attn_implementation": None,  # there is only one implementation
    },
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "roberta": {"pad_token_id": 1},
    "distilbert": {},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "llama": {"num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {},
    "bart": {"pad_token_id": 1},
    "t5": {"d_kv": 24, "decoder_start_token_id": 0},
}


def tiny(family: str) -> Backbone:
    settings = {**BERT, "attn_implementation": "eager", **TINY[family]}
    if family != "t5":
        return tiny_classifier(family, num_labels=2, **settings)
    torch.manual_seed(0)
    words = Verbalizer(label_names=("no", "yes"), token_ids=((3,), (4,)))
    return cut(T5ForConditionalGeneration(tiny_config("t5", **settings)), words).freeze()


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


@pytest.fixture(scope="module")
def bert_base() -> Backbone:
    config = BertConfig(attn_implementation="eager")
    with torch.device("meta"):
        return cut(BertForSequenceClassification(config)).freeze()


def on_meta(backbone: Backbone, name: str, num_inputs: int, options: dict | None = None) -> Method:
    with torch.device("meta"):
        return build_method(name, BackboneShape.of(backbone), num_inputs, options)


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


def kept_by_torch(model: MultiplexedClassifier, batch_size: int, length: int) -> int:
    """Return the bytes that autograd keeps, without weights."""
    ids = torch.ones(batch_size, length, dtype=torch.long)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.run_tokens({"input_ids": ids}, torch.arange(batch_size).view(-1, model.num_inputs))
    assert output.scores.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("name", "num_inputs"), [("revmux", 2), ("token-split", 4), ("datamux", 2)])
def test_estimated_activations_equal_what_autograd_keeps(name, num_inputs):
    torch.manual_seed(0)
    backbone = cut(BertForSequenceClassification(BertConfig(**{**BERT, "num_hidden_layers": 6}))).freeze()
    options = {"demultiplexer": "mlp", "dropout": 0.0} if name == "datamux" else {}
    method = build_method(name, BackboneShape.of(backbone), num_inputs, options).eval()
    if method.tunes_backbone:
        backbone.requires_grad_(True)
    estimate = estimate_memory(backbone, method, 2, 16, 32, dtype=torch.float32)
    real = kept_by_torch(MultiplexedClassifier(backbone, method, 2), 16, 32)  # as in training, without dropout
    assert estimate.activations == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("revmux", {}), ("mux-plm", {"learn_keys": True, "tune_backbone": False})]
)
def test_estimated_activations_of_t5_equal_what_autograd_keeps(name, options, checkpointing):
    backbone = tiny("t5").to(torch.bfloat16)
    method = build_method(name, BackboneShape.of(backbone), 2, options).eval()
    estimate = estimate_memory(backbone, method, 1, 16, 32, torch.bfloat16, checkpointing)
    assert not backbone.gradient_checkpointing
    backbone.gradient_checkpointing = checkpointing
    real = kept_by_torch(MultiplexedClassifier(backbone, method, 1), 16, 32)
    again = estimate.working / 2 if checkpointing else 0  # one layer is computed again, on half as many sequences
    assert estimate.activations == pytest.approx(real + again, rel=0.05)


@pytest.mark.parametrize(("options", "prefill_layers"), [({"soft_prompt": 5}, 0), ({"tune_backbone": True}, 2)])
def test_estimate_counts_what_a_task_model_trains(options, prefill_layers):
    backbone = tiny("llama")
    method = build_method("siso", BackboneShape.of(backbone), 1, options)
    if "soft_prompt" in options:
        words = Verbalizer(label_names=("no", "yes"), token_ids=((3,), (4,)))
        config = LlamaConfig(**BERT, num_key_value_heads=2, head_dim=24)
        backbone = cut(LlamaForCausalLM(config), words).freeze()
    estimate = estimate_memory(backbone, method, prefill_layers, 4, 16)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    method.unfreeze(backbone, prefill_layers)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    assert estimate.optimizer == 2 * estimate.gradients == 8 * trained
    if "soft_prompt" in options:
        assert trained == 5 * backbone.hidden_size


def test_estimate_counts_weights_by_type(bert_base):
    method = on_meta(bert_base, "revmux", 2)
    estimate = estimate_memory(bert_base, method, 6, 32, 128)
    weights = sum(parameter.numel() for parameter in bert_base.parameters())
    assert estimate.backbone == 2 * weights
    assert estimate.adapters == estimate.gradients == 4 * 9_445_248
    assert estimate.optimizer == 8 * 9_445_248
    assert (
        estimate.total
        > estimate.backbone + estimate.adapters + estimate.gradients + estimate.optimizer + estimate.activations
    )


def test_checkpointing_and_tuning_change_the_estimate(bert_base):
    frozen, tuned = on_meta(bert_base, "revmux", 2), on_meta(bert_base, "revmux", 2, {"tune_backbone": True})
    whole = estimate_memory(bert_base, frozen, 6, 32, 128)
    again = estimate_memory(bert_base, frozen, 6, 32, 128, gradient_checkpointing=True)
    assert again.activations < 0.6 * whole.activations
    assert again.optimizer == whole.optimizer
    every = estimate_memory(bert_base, tuned, 6, 32, 128)
    weights = sum(parameter.numel() for parameter in bert_base.parameters())
    assert every.optimizer == 8 * (weights + 9_445_248)
    assert every.activations > 3 * whole.activations


def test_the_estimate_refuses_a_batch_that_is_not_a_whole_number_of_groups(bert_base):
    with pytest.raises(UserError, match=r"batch_size \(30\) must be divisible by num_inputs \(4\)"):
        estimate_memory(bert_base, on_meta(bert_base, "revmux", 4), 6, 30, 128)


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("bert-base", 109),
        ("bert-large", 335),
        ("t5-small", 60),
        ("t5-base", 223),
        ("t5-large", 738),
        ("llama-3-8b", 8030),
        ("llama-3-70b", 70554),
    ],
)
def test_presets_have_the_size_of_the_published_models(model, millions):
    backbone = meta_backbone(model)
    assert sum(parameter.numel() for parameter in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert all(parameter.is_meta for parameter in backbone.parameters())


def test_an_unknown_model_is_refused_with_the_list_of_presets():
    with pytest.raises(UserError, match=f"neither one of {', '.join(PRESETS)}, .*, smollm2-135m nor"):
        config_of("bert-huge")


def test_a_local_model_folder_is_estimated_from_its_config(tmp_path):
    BertConfig(**BERT, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    assert meta_backbone(str(tmp_path)).hidden_size == 64


@pytest.mark.parametrize("model_type", ["vit", "unknown-architecture"])
def test_an_unsupported_architecture_is_refused_without_running_its_code(command, tmp_path, monkeypatch, model_type):
    ran = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the user would answer yes if asked to trust the code
    (tmp_path / "own.py").write_text(
        "import pathlib\nfrom transformers import PretrainedConfig\n"
        f"pathlib.Path({str(ran)!r}).touch()\nclass Own(PretrainedConfig):\n    model_type = {model_type!r}\n"
    )
    settings = {"model_type": model_type, "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for subcommand in ("cost", "memory"):
        status, _, errors = command(subcommand, "--model", str(tmp_path))
        assert status == 2
        assert f"unsupported architecture '{model_type}'; supported: bart, bert" in errors
        assert "docs/add-a-backbone.md" in errors
    assert not ran.exists()


def test_remote_code_of_a_supported_architecture_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    BertConfig(**BERT, auto_map={"AutoConfig": "own.Own"}).save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise RuntimeError('the code of a folder ran')\n")
    assert type(config_of(str(tmp_path))) is BertConfig


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``python -m revmux ...`` in this process: exit status, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["revmux", *arguments])
        status = main()
        return status, *capsys.readouterr()

    return run


def test_command_line_prints_speedups_and_memory(command, tmp_path):
    BertConfig(**BERT, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    model = str(tmp_path)
    status, cost, _ = command(
        "cost", "--model", model, "--num_inputs", "[2]", "--prefill_layers", "[1]", "--length", "64"
    )
    assert status == 0
    assert cost.splitlines()[-1].split()[:3] == ["2", "1", "1.50×"]
    status, memory, _ = command("memory", "--model", model, "--batch_size", "[4]", "--length", "[16]")
    assert status == 0
    assert [line.split()[2] for line in memory.splitlines()[5:7]] == ["no", "yes"]


def test_the_command_line_accepts_the_options_of_a_method(command):
    arguments = ("--num_inputs", "[2]", "--prefill_layers", "[3]", "--length", "32")
    status, _, errors = command("cost", "--model", "t5-small", "--method", "datamux", *arguments)
    assert status == 2
    assert "choose demultiplexer 'mlp'" in errors
    options = ("--options", "{demultiplexer: mlp}")
    status, cost, _ = command("cost", "--model", "t5-small", "--method", "datamux", *options, *arguments)
    assert status == 0
    assert cost.splitlines()[-1].split()[:2] == ["2", "3"]
    status, cost, _ = command("cost", "--method", "exit-head", "--options", "{layer: 3}", "--length", "128")
    assert status == 0
    n, cut_at, ceiling, counted = cost.splitlines()[-1].split()
    assert (n, cut_at, ceiling) == ("1", "3", "4.00×")
    assert float(counted.rstrip("×")) == pytest.approx(4, rel=0.02)
    status, frozen, _ = command("memory", "--model", "t5-small", "--length", "[16]", "--dtype", "float32")
    tuned = command("memory", "--model", "t5-small", "--length", "[16]", "--options", "{tune_backbone: true}")
    assert status == tuned[0] == 0
    adam = [float(text.splitlines()[5].split()[7]) for text in (frozen, tuned[1])]
    assert adam[1] > 4 * adam[0]
    assert tuned[1].splitlines()[-1] == "Servers load no adapters that tune the backbone."
    status, _, errors = command("memory", "--options", "{own_stat: mlp}")
    assert status == 2
    assert "own_state" in errors


def test_command_line_lists_every_method_with_its_options(command):
    status, listed, _ = command("methods")
    assert status == 0
    heads = [line.partition(":")[0] for line in listed.splitlines() if not line.startswith(" ")]
    assert heads == method_names()
    assert "    layer (default 1): e, the layer whose states the head reads, from 0 (embeddings) to L." in listed
    for name in method_names():
        assert all(
            f"    {option.name} (default {option.default}): " in listed for option in fields(method_class(name).Options)
        )


@pytest.mark.parametrize(("name", "valid"), [("revmux", 64), ("datamux", 61)])
def test_a_length_beyond_the_position_embeddings_is_refused(name, valid):
    backbone = tiny("bert")
    method = build_method(name, BackboneShape.of(backbone), 2)
    message = f"the backbone accepts at most 64; truncate texts to {valid}"
    with pytest.raises(UserError, match=message):
        count_flops(backbone, method, 1, 65)
    with pytest.raises(UserError, match=message):
        estimate_memory(backbone, method, 1, 4, 65)


def test_command_line_reports_a_mistake_on_one_line(command):
    status, _, errors = command("cost", "--model", "bert-huge")
    assert status == 2
    assert errors.startswith("error: model is 'bert-huge'")
    assert len(errors.strip().splitlines()) == 1


def test_the_compared_exit_layer_is_the_deepest_one_that_costs_no_more() -> None:
    backbone = meta_backbone("bert-base")
    method = build_method("revmux", BackboneShape.of(backbone), 2)
    layer = rival_exit_layer(backbone, method, 6, 128)
    cost = relative_cost(backbone, method, 6, 128)
    assert layer / backbone.num_layers <= cost < (layer + 1) / backbone.num_layers
