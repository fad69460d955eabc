"""Every method on a tiny backbone: shapes, gradients, padding, sizes and mistakes."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from numeric import assert_close
from tiny_methods import LENGTH, PADDING, groups_of, randomised, texts, tiny_bert, with_padding

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.methods import method_names
from revmux.methods.registry import METHODS

pytestmark = pytest.mark.numeric

SYSTEMS = [
    ("revmux", {}),
    ("revmux", {"own_state": "linear", "exit_layer": 2}),
    ("revmux", {"up": "inverse", "activation": "gelu", "own_state": "attention"}),
    ("revmux", {"up": "zero", "activation": "gelu", "own_state": "attention"}),
    ("vanilla-adapter", {}),
    ("vanilla-adapter", {"own_state": "mlp"}),
    ("only-multiplexer-reversible", {}),
    ("only-multiplexer-reversible", {"own_state": "linear"}),
    ("datamux", {}),
    ("datamux", {"demultiplexer": "mlp", "keys": "orthogonal", "learn_keys": True}),
    ("mux-plm", {"learn_keys": True}),
    ("mux-plm", {"multiplexer": "contextual", "heads": 4}),
    ("token-split", {}),
    ("token-split", {"own_state": "none", "exit_layer": 2}),
    ("token-split", {"ratio": 3}),
    ("token-split", {"ratio": 4, "kept_tokens": 2}),
]


@pytest.mark.parametrize("num_inputs", [2, 4, 5, 8, 10, 16])
@pytest.mark.parametrize(("name", "options"), SYSTEMS)
def test_shapes(bert, name, options, num_inputs):
    model = MultiplexedClassifier(bert, randomised(bert, name, num_inputs, options), 1).eval()
    output = model.run_tokens(texts(2 * num_inputs), groups_of(num_inputs))
    assert output.answers.shape == (2, num_inputs, 80)
    assert output.vectors.shape == (2, num_inputs, 80)
    assert output.scores.shape == (2, num_inputs, 3)
    assert output.scores.isfinite().all()
    assert (output.shared is not None) == model.method.has_auxiliary_loss


@pytest.mark.parametrize("num_inputs", [2, 4, 8, 16])
@pytest.mark.parametrize(("name", "options"), SYSTEMS)
def test_gradients_reach_every_adapter_weight_and_no_frozen_weight(bert, name, options, num_inputs):
    method = randomised(bert, name, num_inputs, options)
    model = MultiplexedClassifier(bert, method, 1)
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    output = model.run_tokens(tokens, groups)
    loss = output.scores.square().sum()
    if method.has_auxiliary_loss:
        # Often enough that every slot is sampled.
        asked = tokens["input_ids"][groups], tokens["attention_mask"][groups]
        loss = loss + sum(method.auxiliary_loss(bert, output.shared, *asked) for _ in range(60))
    loss.backward()
    untouched = [
        parameter_name
        for parameter_name, parameter in method.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert untouched == []
    assert all(parameter.grad is None for parameter in bert.parameters())
    assert all(parameter.grad is None for parameter in method.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize(("name", "options"), [*SYSTEMS, ("exit-head", {"layer": 2}), ("siso", {})])
@torch.no_grad()
def test_training_reads_the_same_tokens_as_inference(bert, name, options):
    num_inputs = 1 if name in ("exit-head", "siso") else 4
    model = MultiplexedClassifier(bert, randomised(bert, name, num_inputs, options), 1).eval()
    tokens, groups = model.slot_tokens(texts(2 * num_inputs), groups_of(num_inputs))
    prefilled = model.prefill(tokens)
    mixed, own = model.multiplex(prefilled, groups), model.method.own_states(bert, prefilled)[groups]
    whole, trained = (model.answer(upper(mixed), own) for upper in (model.upper, model.upper_in_training))
    assert_close(trained.scores, whole.scores)
    assert_close(trained.answers, whole.answers)


@torch.no_grad()
def test_an_up_projection_from_zero_starts_with_the_answers_of_the_own_state_correction_alone(bert):
    method = build_method("revmux", BackboneShape.of(bert), 2, {"up": "zero", "own_state": "attention"})
    for weight in method.own_state.parameters():
        weight.normal_(std=0.1)
    model = MultiplexedClassifier(bert, method, 1).eval()
    prefilled = model.prefill(texts(4))
    own = method.own_states(bert, prefilled)[groups_of(2)]
    alone = method.own_state(torch.zeros(*own.shape[:2], bert.hidden_size), own)
    assert_close(model.run_groups(prefilled, groups_of(2)).answers, alone)
    method.up.linear.weight.normal_(std=0.1)
    assert not torch.allclose(model.run_groups(prefilled, groups_of(2)).answers, alone)


def test_methods_that_tune_the_backbone_send_gradients_into_the_prefill():
    backbone = tiny_bert()
    backbone.requires_grad_(True)
    method = randomised(backbone, "datamux", 2, {})
    MultiplexedClassifier(backbone, method, 1).run_tokens(texts(4), groups_of(2)).scores.sum().backward()
    assert backbone.layer(0).attention.self.query.weight.grad.any()


@pytest.mark.parametrize("name", ["revmux", "only-multiplexer-reversible"])
@pytest.mark.parametrize("num_inputs", [2, 3, 4, 8, 16])
def test_the_chain_is_exactly_invertible(name, num_inputs):
    shape = BackboneShape(48, num_layers=3, num_labels=2, readout_size=48, shared_answer=True, vocab_size=60)
    torch.manual_seed(3)
    method = build_method(name, shape, num_inputs, {"zero_init": False})
    slots = [torch.randn(5, 48 // num_inputs) for _ in range(num_inputs)]
    mixed = method.chain(slots)
    assert not torch.allclose(torch.stack(mixed), torch.stack(slots), atol=1e-2)
    assert_close(torch.stack(method.chain.reverse(mixed)), torch.stack(slots))


@pytest.mark.parametrize("num_inputs", [2, 4])
@pytest.mark.parametrize(("name", "options"), SYSTEMS)
def test_padding_changes_no_answer(bert, name, options, num_inputs):
    model = MultiplexedClassifier(bert, randomised(bert, name, num_inputs, options), 1).eval()
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    plain = model.run_tokens(tokens, groups).scores
    padded = model.run_tokens(with_padding(tokens, 4, garbage=17), groups).scores
    assert_close(padded, plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["revmux", "token-split"])
def test_padding_changes_no_answer_of_a_causal_backbone(llama, name, side):
    model = MultiplexedClassifier(llama, randomised(llama, name, 2, {}), 1).eval()
    tokens, groups = texts(4), groups_of(2)
    if side == "left":
        shifts = LENGTH - tokens["attention_mask"].sum(dim=1)
        tokens = {
            key: torch.stack([row.roll(int(shift)) for row, shift in zip(tensor, shifts)])
            for key, tensor in tokens.items()
        }
    plain = model.run_tokens(tokens, groups).scores
    if side == "left":
        more = torch.zeros(4, 3, dtype=torch.long)
        wider = {key: torch.cat([more, tensor], dim=1) for key, tensor in tokens.items()}
    else:
        wider = with_padding(tokens, 3, garbage=PADDING)
    assert_close(model.run_tokens(wider, groups).scores, plain)


def test_an_early_exit_skips_the_last_layers(bert):
    for name in ("revmux", "token-split"):
        method = randomised(bert, name, 2, {"exit_layer": 2})
        model = MultiplexedClassifier(bert, method, 1)
        shared = model.upper(model.multiplex(model.prefill(texts(2)), torch.tensor([[0, 1]])))
        assert shared.depth == 2
        with pytest.raises(UserError, match=r"prefill_layers is 3.*0\.\.2"):
            MultiplexedClassifier(bert, method, 3)


def test_index_demultiplexer_accepts_any_prefill_and_limits_the_length(bert):
    method = randomised(bert, "datamux", 4, {})
    assert method.added_tokens == 5
    tokens = {"input_ids": torch.ones(4, 36, dtype=torch.long)}
    with pytest.raises(
        UserError,
        match=r"41 tokens \(5 of them added by datamux\), but the backbone accepts at most 40; truncate texts to 35",
    ):
        MultiplexedClassifier(bert, method, 0).run_tokens(tokens, torch.arange(4).unsqueeze(0))


def test_index_demultiplexer_reads_own_last_tokens_of_a_causal_backbone(llama):
    model = MultiplexedClassifier(llama, randomised(llama, "datamux", 2, {}), 0).eval()
    tokens = texts(4)
    scores = model.run_tokens(tokens, groups_of(2)).scores
    changed = {**tokens, "input_ids": tokens["input_ids"].clone()}
    changed["input_ids"][0, 2] += 1  # the last token of the first input, which has three
    difference = (model.run_tokens(changed, groups_of(2)).scores - scores).abs().amax(dim=-1)
    assert difference[0, 0] > 1e-4
    assert difference[1].max() < 1e-6


@pytest.mark.parametrize(
    ("name", "weights"),
    [("revmux", 9_445_248), ("vanilla-adapter", 16_525_056), ("only-multiplexer-reversible", 12_100_224)],
)
def test_methods_have_as_many_weights_as_in_the_paper(name, weights):
    with torch.device("meta"):
        shape = BackboneShape(768, num_layers=12, num_labels=2, readout_size=768, shared_answer=True, vocab_size=30522)
        assert build_method(name, shape, 2).tunable_parameters() == weights


@pytest.mark.parametrize("name", ["revmux", "only-multiplexer-reversible"])
def test_a_hidden_size_that_cannot_be_divided_is_refused(bert, name):
    with pytest.raises(
        UserError, match=r"hidden_size \(80\) must be divisible by num_inputs \(3\); choose N from 2, 4"
    ):
        build_method(name, BackboneShape.of(bert), 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("datamux", {"keys": "binary"}, "unknown keys 'binary'; known: gaussian, orthogonal"),
        ("datamux", {"demultiplexer": "rsa"}, "unknown demultiplexer 'rsa'; known: index, mlp"),
        ("datamux", {"index_tokens": [1, 2]}, r"N = 2 needs 3 distinct ids in 0\.\.59"),
        ("datamux", {"index_tokens": [1, 2, 60]}, r"N = 2 needs 3 distinct ids in 0\.\.59"),
        ("datamux", {"retrieval_weight": 0.0, "warmup_steps": 5}, "set retrieval_weight above 0"),
        ("mux-plm", {"multiplexer": "none"}, "unknown multiplexer 'none'; known: gaussian, contextual"),
        ("mux-plm", {"multiplexer": "contextual", "heads": 3}, r"hidden_size \(80\) must be divisible by heads \(3\)"),
        ("mux-plm", {"demultiplexer_layers": 0}, "choose 1 or more"),
        ("token-split", {"exit_layer": 4}, r"exit_layer is 4; this backbone has layers 0\.\.3"),
        ("token-split", {"pooling_width": -1}, "pooling_width is -1"),
        ("revmux", {"exit_layer": -1}, r"exit_layer is -1; this backbone has layers 0\.\.3"),
        ("vanilla-adapter", {"ratio": 2}, "known options: dropout, output_relu, own_state"),
        ("revmux", {"own_state": "all"}, "unknown own_state .all.; known: none, linear, mlp, attention"),
        ("revmux", {"up": "none"}, "unknown up .none.; known: mlp, inverse, zero"),
        ("revmux", {"lora_rank": -1}, "lora_rank is -1; choose 0"),
        ("token-split", {"ratio": 1}, "pools 1 tokens into one"),
    ],
)
def test_wrong_settings_are_refused_with_the_valid_ones(bert, name, options, message):
    with pytest.raises(UserError, match=message):
        build_method(name, BackboneShape.of(bert), 2, options)


def test_every_method_of_the_paper_is_registered():
    expected = {"siso", "exit-head", "skip-only", "revmux", "token-split", *(name for name, _ in SYSTEMS)}
    assert expected <= set(method_names())


def test_a_method_is_restored_from_its_state(bert):
    for name, options in SYSTEMS:
        method = randomised(bert, name, 2, options)
        copy = build_method(name, BackboneShape.of(bert), 2, method.options_dict())
        copy.load_state_dict(method.state_dict())
        tokens, groups = texts(4), groups_of(2)
        first = MultiplexedClassifier(bert, method, 1).eval().run_tokens(tokens, groups).scores
        again = MultiplexedClassifier(bert, copy, 1).eval().run_tokens(tokens, groups).scores
        torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_the_documented_method_works(bert, monkeypatch):
    """The example of docs/add-a-method.md, as a user would copy it."""
    page = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    exec(code, {"__name__": "my_package.mean_mix"})
    method = build_method("mean-mix", BackboneShape.of(bert), 4, {"bias": False})
    assert MultiplexedClassifier(bert, method, 1)(texts(6)).shape == (6, 3)


ANOTHER_PROCESS = """
import sys
from revmux import __main__
from revmux.backbone import supported_model_types
assert "mpnet" in supported_model_types()
sys.argv = ["revmux", "cost", "--method", "mean-mix", "--model", "t5-small"]
sys.exit(__main__.main())
"""


def test_commands_find_methods_and_backbones_of_an_installed_package(tmp_path):
    """Install the packages of both pages as pip would, and a broken one."""
    docs = Path(__file__).parents[1] / "docs"
    files, groups = {"__init__.py": ""}, ""
    for page, module in (("add-a-method.md", "mean_mix.py"), ("add-a-backbone.md", "mpnet.py")):
        text = (docs / page).read_text()
        files[module] = text.split("```python\n")[1].split("```")[0]
        project = tomllib.loads(text.split("```toml\n")[1].split("```")[0])["project"]["entry-points"]
        for group, entries in project.items():
            groups += f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
    (tmp_path / "my_package").mkdir()
    for name, content in files.items():
        (tmp_path / "my_package" / name).write_text(content)
    for name, entries in {"my-package": groups, "broken": "[revmux.methods]\nbroken = no_such_module\n"}.items():
        information = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(entries)
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(docs.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mean-mix" in done.stdout
    assert "no_such_module of broken cannot be loaded (ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(("name", "options"), [("datamux", {}), ("datamux", {"demultiplexer": "mlp"}), ("mux-plm", {})])
def test_the_auxiliary_loss_of_a_frozen_bfloat16_backbone_trains_float32_adapters(name, options):
    backbone = tiny_bert().to(torch.bfloat16)
    method = randomised(backbone, name, 2, options)
    tokens, groups = texts(4), groups_of(2)
    output = MultiplexedClassifier(backbone, method, 0).run_tokens(tokens, groups)
    loss = method.auxiliary_loss(backbone, output.shared, tokens["input_ids"][groups], tokens["attention_mask"][groups])
    loss.backward()
    assert loss.dtype == torch.float32
