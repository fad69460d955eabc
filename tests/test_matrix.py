"""Every method on every family of backbone at every N: shapes, gradients, files, padding, reversibility."""

from pathlib import Path

import pytest
import torch
from test_backbone_encoders import frozen
from test_backbone_seq2seq_decoder import backbone_of
from test_methods import groups_of, randomised, with_padding

from revmux import MultiplexedClassifier
from revmux.artifact import describe, from_pretrained, save_pretrained
from revmux.backbone import Backbone, TokenBatch, supported_model_types
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.methods import method_names
from revmux.pretrained import Pretrained

FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "deberta-v2": "deberta-v2",
    "modernbert": "modernbert",
    "t5": "t5-words",
    "bart": "bart-words",
    "llama": "llama-words",
    "mistral": "mistral-words",
    "qwen2": "qwen2-words",
    "qwen3": "qwen3-head",
    "gpt2": "gpt2-words",
}
METHODS = [
    ("revmux", {}),
    ("revmux", {"skip": True}),
    ("revmux", {"tune_backbone": True}),
    ("vanilla-adapter", {}),
    ("only-multiplexer-reversible", {}),
    ("datamux", {}),
    ("mux-plm", {}),
    ("mux-plm", {"multiplexer": "contextual", "heads": 4}),
    ("token-split", {}),
]
WIDTHS = (2, 4, 8, 16)
CUT, LENGTH, RETRIEVAL_ROUNDS = 1, 7, 200
every = pytest.mark.parametrize(
    ("family", "name", "options"), [(family, *method) for family in FAMILIES for method in METHODS]
)


def test_no_family_and_no_method_is_left_out():
    assert set(FAMILIES) == set(supported_model_types())
    assert {name for name, _ in METHODS} | {"siso", "exit-head"} == set(method_names())


def backbone(family: str) -> Backbone:
    model = FAMILIES[family]
    return backbone_of(model) if "-" in model and model != "deberta-v2" else frozen(model)


def system(family: str, name: str, options: dict, num_inputs: int) -> MultiplexedClassifier:
    whole = backbone(family)
    if name == "datamux" and isinstance(whole, EncoderDecoderBackbone):
        options = {**options, "demultiplexer": "mlp"}  # index tokens are read in the encoder, answers in the decoder
    return MultiplexedClassifier(whole, randomised(whole, name, num_inputs, options), CUT).eval()


def texts(rows: int) -> TokenBatch:
    """Random inputs of 3 to LENGTH tokens, padded on the right with the id 1, that of these models."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 30, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < (3 + torch.arange(rows) % (LENGTH - 2)).unsqueeze(1)).long()
    return {"input_ids": ids.where(mask.bool(), torch.tensor(1)), "attention_mask": mask}


@every
@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_shapes_and_gradients(family, name, options, num_inputs):
    model = system(family, name, options, num_inputs)
    method, frozen_one = model.method, model.backbone
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    output = model.run_tokens(tokens, groups)
    assert output.answers.shape == (2, num_inputs, frozen_one.hidden_size)
    assert output.vectors.shape[:2] == (2, num_inputs)
    assert output.scores.shape == (2, num_inputs, frozen_one.num_labels)
    assert output.scores.isfinite().all()
    loss = output.scores.square().sum()
    if method.has_auxiliary_loss:
        ids = tokens["input_ids"][groups]
        rounds = (method.auxiliary_loss(frozen_one, output.shared, ids) for _ in range(RETRIEVAL_ROUNDS))
        loss = loss + sum(rounds)  # so often that every slot is asked for
    loss.backward()
    untouched = [weight for weight, value in method.named_parameters() if value.requires_grad and not value.grad.any()]
    assert untouched == []
    assert all(value.grad is None for value in frozen_one.parameters())


@every
@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_files_and_padding_change_no_answer(family, name, options, num_inputs, tmp_path: Path):
    model = system(family, name, options, num_inputs)
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    with torch.no_grad():
        scores = model.run_tokens(tokens, groups).scores
        padded = model.run_tokens(with_padding(tokens, 3, garbage=1), groups).scores
        assert scores.std() > 1e-4  # answers that are all alike would hide a mix-up
        torch.testing.assert_close(padded, scores, rtol=1e-4, atol=2e-5)
        identity = {"name": family, "revision": None, "sha256": "0" * 64}
        pretrained = Pretrained(model.backbone, None, identity, True)
        folder = save_pretrained(model, describe(model, pretrained, LENGTH, {}), tmp_path / "adapter")
        loaded = from_pretrained(folder, pretrained)
        torch.testing.assert_close(loaded.run_tokens(tokens, groups).scores, scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["revmux", "only-multiplexer-reversible"])
@pytest.mark.parametrize("num_inputs", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_multiplexer_is_inverted_from_its_own_output(family, name, num_inputs):
    model = system(family, name, {}, num_inputs)
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    with torch.no_grad():
        prefilled = model.prefill(tokens)
        mixed = model.multiplex(prefilled, groups)  # (G, S, d)
        slots = model.method.chain.reverse(list(mixed.hidden.chunk(num_inputs, dim=-1)))
        present = prefilled.take(groups)
        down = model.method.down(present.hidden) * present.mask.unsqueeze(-1)  # (G, N, S, d/N)
    torch.testing.assert_close(torch.stack(slots, dim=1), down, rtol=1e-4, atol=1e-4)
