"""Estimated memory, compared with what PyTorch keeps, and the models that can be estimated by name."""

import pytest
import torch
from estimated_models import BERT, on_meta, tiny
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method, cut
from revmux.backbone.verbalizer import Verbalizer
from revmux.estimate.memory import estimate_memory
from revmux.estimate.presets import PRESETS
from revmux.estimate.shapes import config_of, meta_backbone

pytestmark = pytest.mark.numeric


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


def test_remote_code_of_a_supported_architecture_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    BertConfig(**BERT, auto_map={"AutoConfig": "own.Own"}).save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise RuntimeError('the code of a folder ran')\n")
    assert type(config_of(str(tmp_path))) is BertConfig
