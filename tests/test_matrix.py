"""Every method on every backbone family and at every N: shapes, gradients, files, padding, reversibility."""

import copy
from pathlib import Path

import pytest
import torch
from generative_models import DECODERS, backbone_of
from numeric import assert_close
from test_backbone_encoders import frozen
from tiny_methods import groups_of, randomised, with_padding

from revmux import MultiplexedClassifier
from revmux.adapters.folder import describe_adapter, load_adapter, save_adapter
from revmux.backbone import Backbone, TokenBatch, supported_model_types
from revmux.backbone.encoder_decoder import EncoderDecoderBackbone
from revmux.fallback import confidence, resume
from revmux.methods import method_names
from revmux.pretrained.pretrained import Pretrained

pytestmark = pytest.mark.numeric

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
CUT, LENGTH, RETRIEVAL_ROUNDS = 1, 7, 200
STRONG = {"activation": "gelu", "up": "zero", "own_state": "attention", "lora_rank": 2}
METHODS = [
    ("revmux", {}),
    ("revmux", STRONG),
    ("revmux", {"tune_backbone": True}),
    ("vanilla-adapter", {}),
    ("only-multiplexer-reversible", {}),
    ("datamux", {}),
    ("mux-plm", {}),
    ("mux-plm", {"multiplexer": "contextual", "heads": 4}),
    ("token-split", {}),
]
REVERSIBLE = [("revmux", {}), ("only-multiplexer-reversible", {})]
ALONE = [
    ("siso", {}),
    ("exit-head", {"layer": 2, "attention_pooling": True, "lora_rank": 2}),
    ("skip-only", {"layer": CUT}),
]
WIDTHS = (2, 4, 8, 16)
WIDE_FAMILY = "bert"
"""Tested at every width. Width and family barely interact, so the others have one width per method, taken in turn."""


def widths(family: str, turn: int) -> tuple[int, ...]:
    place = list(FAMILIES).index(family) + turn
    return WIDTHS if family == WIDE_FAMILY else (WIDTHS[place % len(WIDTHS)],)


SYSTEMS = [
    *(
        (family, *method, width)
        for family in FAMILIES
        for turn, method in enumerate(METHODS)
        for width in widths(family, turn)
    ),
    *((family, *method, 1) for family in FAMILIES for method in ALONE),
]
every = pytest.mark.parametrize(("family", "name", "options", "num_inputs"), SYSTEMS)


def test_the_matrix_covers_every_family_method_and_width():
    assert {(family, name, repr(options)) for family, name, options, _ in SYSTEMS} == {
        (family, name, repr(options)) for family in FAMILIES for name, options in (*METHODS, *ALONE)
    }
    for name, options in METHODS:
        assert {width for _, *method, width in SYSTEMS if method == [name, options]} == set(WIDTHS)
    assert set(FAMILIES) == set(supported_model_types())
    assert {name for name, _ in METHODS} | {name for name, _ in ALONE} == set(method_names())


def backbone(family: str) -> Backbone:
    model = FAMILIES[family]
    return backbone_of(model) if "-" in model and model != "deberta-v2" else frozen(model)


def system(family: str, name: str, options: dict, num_inputs: int) -> MultiplexedClassifier:
    whole = backbone(family)
    if options.get("tune_backbone"):
        whole = copy.deepcopy(whole)  # as after tuning: weights that differ from the backbone at loading
        with torch.no_grad():
            for weight in whole.parameters():
                weight.mul_(1.1)
    if name == "datamux" and isinstance(whole, EncoderDecoderBackbone):
        options = {**options, "demultiplexer": "mlp"}  # index tokens are read in the encoder, answers in the decoder
    model = MultiplexedClassifier(whole, randomised(whole, name, num_inputs, options), CUT).eval()
    if model.method.lora is not None:
        for factor in model.method.lora.parameters():
            factor.data.normal_(0, 0.1)
    return model


def texts(rows: int) -> TokenBatch:
    """Random inputs of 3 to LENGTH tokens, right-padded with the models' padding id 1."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 30, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < (3 + torch.arange(rows) % (LENGTH - 2)).unsqueeze(1)).long()
    return {"input_ids": ids.where(mask.bool(), torch.tensor(1)), "attention_mask": mask}


def padded_left(tokens: TokenBatch, columns: int) -> TokenBatch:
    """The same inputs with their padding in front, and more of it."""
    shifts = (LENGTH - tokens["attention_mask"].sum(dim=1)).tolist()
    rolled = {
        name: torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts)]) for name, tensor in tokens.items()
    }
    return {name: torch.nn.functional.pad(tensor, (columns, 0)) for name, tensor in rolled.items()}


@every
def test_shapes_and_gradients(family, name, options, num_inputs):
    model = system(family, name, options, num_inputs)
    method, frozen_one = model.method, model.backbone
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    output = model.run_tokens(tokens, groups)
    read = 2 if name == "exit-head" else 1  # an exit head reads the answer state and the mean
    assert output.answers.shape == (2, num_inputs, read * frozen_one.hidden_size)
    assert output.vectors.shape[:2] == (2, num_inputs)
    assert output.scores.shape == (2, num_inputs, frozen_one.num_labels)
    assert output.scores.isfinite().all()
    loss = output.scores.square().sum()
    if method.has_auxiliary_loss:
        asked = tokens["input_ids"][groups], tokens["attention_mask"][groups]
        rounds = (method.auxiliary_loss(frozen_one, output.shared, *asked) for _ in range(RETRIEVAL_ROUNDS))
        loss = loss + sum(rounds)  # often enough that every slot is sampled
    if name == "siso":
        assert not list(method.parameters())
        return
    loss.backward()
    untouched = [weight for weight, value in method.named_parameters() if value.requires_grad and not value.grad.any()]
    assert untouched == []
    assert all(value.grad is None for value in frozen_one.parameters())


@every
def test_saving_loading_and_padding_change_no_answer(family, name, options, num_inputs, tmp_path: Path):
    model = system(family, name, options, num_inputs)
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    with torch.no_grad():
        scores = model.run_tokens(tokens, groups).scores
        # Models of this type count positions from the padding id, so theirs must stay.
        garbage = 1 if family == "roberta" else 9
        padded = model.run_tokens(with_padding(tokens, 3, garbage), groups).scores
        assert scores.std() > 1e-4  # identical answers would hide a mix-up
        assert_close(padded, scores)
        if family in DECODERS:
            left = model.run_tokens(padded_left(tokens, 0), groups).scores
            wider = model.run_tokens(padded_left(tokens, 3), groups).scores
            assert_close(wider, left)
        identity = {"name": family, "revision": None, "sha256": "0" * 64}
        pretrained = Pretrained(backbone(family), None, identity, True)
        folder = save_adapter(model, describe_adapter(model, pretrained, LENGTH, {}), tmp_path / "adapter")
        loaded = load_adapter(folder, pretrained)
        assert_close(loaded.run_tokens(tokens, groups).scores, scores)


@pytest.mark.parametrize(
    ("family", "name", "num_inputs"),
    [system[:2] + system[3:] for system in SYSTEMS if system[1:3] in REVERSIBLE],
)
def test_the_multiplexer_is_inverted_from_its_own_output(family, name, num_inputs):
    model = system(family, name, {}, num_inputs)
    tokens, groups = texts(2 * num_inputs), groups_of(num_inputs)
    with torch.no_grad():
        prefilled = model.prefill(tokens)
        mixed = model.multiplex(prefilled, groups)  # (G, S, d)
        slots = model.method.chain.reverse(list(mixed.hidden.chunk(num_inputs, dim=-1)))
        present = prefilled.take(groups)
        down = model.method.down(present.hidden) * present.mask.unsqueeze(-1)  # (G, N, S, d/N)
    assert_close(torch.stack(slots, dim=1), down)


@pytest.mark.parametrize(
    ("family", "name", "options", "num_inputs"),
    [
        *((family, "revmux", STRONG, 2) for family in FAMILIES),
        *(("bert", name, options, 4) for name, options in METHODS),
        *(("bert", name, options, 1) for name, options in ALONE),
    ],
)
def test_a_pass_does_not_depend_on_the_process_wide_default_dtype(family, name, options, num_inputs):
    model, tokens = system(family, name, options, num_inputs), texts(2 * num_inputs)

    def answers() -> list[torch.Tensor]:
        with torch.inference_mode():
            prefilled = model.backbone.run(model.backbone.embed(tokens), CUT)
            return [model(tokens), model.backbone(tokens), confidence(model(tokens)), resume(model.backbone, prefilled)]

    expected = answers()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it loads a model in bfloat16
    try:
        found = answers()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
