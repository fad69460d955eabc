"""The constant prefix of a prompt runs once, and every pass computes the same as without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_models import LAYERS, LENGTHS, MODELS, backbone_of, is_decoder
from numeric import assert_close
from test_prompts import byte_tokenizer, word_tokenizer
from tiny_models import TEMPLATE, write_language_model
from torch import nn

from revmux import BackboneConfig, BackboneShape, MultiplexedClassifier, UserError, build_method, load_pretrained
from revmux.backbone import TokenBatch
from revmux.backbone.decoder import DecoderBackbone
from revmux.data.constant_prefix import constant_tokens
from revmux.data.prompt import Prompt
from revmux.estimate.flops import count_flops, plain_cost
from revmux.estimate.memory import estimate_memory
from revmux.ladder import Ladder, Stage

pytestmark = pytest.mark.numeric

CONSTANT = (5, 6, 7, 8, 9)
DECODERS = pytest.mark.parametrize("name", [name for name in MODELS if is_decoder(name)])
SIDES = pytest.mark.parametrize("side", ["right", "left"])
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "revmux": (2, {"zero_init": False, "own_state": "attention"}),
    "revmux lora": (4, {"zero_init": False, "lora_rank": 2}),
    "vanilla-adapter": (2, {}),
    "only-multiplexer-reversible": (2, {}),
    "datamux": (2, {"tune_backbone": False}),
    "mux-plm": (2, {"tune_backbone": False, "retrieval_weight": 0.0}),
    "mux-plm contextual": (2, {"tune_backbone": False, "multiplexer": "contextual", "heads": 2}),
    "siso": (1, {}),
    "skip-only": (1, {"layer": 2}),
    "exit-head": (1, {"layer": 2, "attention_pooling": True}),
}


def batch(side: str = "right", constant: tuple[int, ...] = CONSTANT) -> TokenBatch:
    """Inputs that begin with the constant tokens, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS) + len(constant)
    ids, mask = torch.full((len(LENGTHS), width), 1), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        text = torch.cat([torch.tensor(constant), torch.randint(4, 60, (length,), generator=generator)])
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def decoder(name: str, constant: tuple[int, ...] = CONSTANT, attention: str = "sdpa", soft: int = 0) -> DecoderBackbone:
    backbone = backbone_of(name, attention)
    assert isinstance(backbone, DecoderBackbone)
    backbone.keep_prefix(constant)
    if soft:
        torch.manual_seed(5)
        backbone.add_soft_prompt(soft)
    backbone.freeze()
    return backbone


def classifier(backbone: DecoderBackbone, kind: str, depth: int) -> MultiplexedClassifier:
    torch.manual_seed(0)
    width, options = METHODS[kind]
    method = build_method(kind.split()[0], BackboneShape.of(backbone), width, options)
    model = MultiplexedClassifier(backbone, method, depth)
    for weight in method.parameters():  # no factor stays at its initial zero
        nn.init.normal_(weight, std=0.2)
    return model.eval()


def layer_rows(backbone: DecoderBackbone, run: Callable[[], Any]) -> list[tuple[int, int]]:
    """The shapes (B, S) that layer 1 sees."""
    shapes: list[tuple[int, int]] = []
    handle = backbone.layer(0).register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    run()
    handle.remove()
    return shapes


@DECODERS
@SIDES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("soft", [0, 3])
def test_a_plain_model_computes_the_same_with_its_prefix_computed_once(
    name: str, side: str, attention: str, soft: int
) -> None:
    backbone = decoder(name, attention=attention, soft=soft)
    with torch.no_grad():
        whole = backbone.embed_whole(batch(side))
        state = backbone.embed(batch(side))
        assert state.hidden.shape[1] == max(LENGTHS)
        assert whole.prefix is None
        for depth in range(LAYERS + 1):
            state, whole = backbone.run(state, depth), backbone.run(whole, depth)
            joined = state.whole()
            assert torch.equal(joined.mask, whole.mask)
            assert torch.equal(joined.answer, whole.answer)
            assert_close(joined.hidden[joined.mask], whole.hidden[whole.mask])
            assert_close(backbone.own_states(state), backbone.own_states(whole))
        scores = backbone.classify(backbone.answers(state))
        assert_close(scores, backbone.classify(backbone.answers(whole)))
        assert scores.std(dim=0).min() > 1e-2
    backbone.soft_prompt = None


@DECODERS
def test_a_soft_prompt_alone_is_a_prefix(name: str) -> None:
    backbone = decoder(name, (), soft=4)
    with torch.no_grad():
        assert len(backbone.constant_prefix() or ()) == 4
        state = backbone.run(backbone.embed(batch()), LAYERS)
        whole = backbone.run(backbone.embed_whole(batch()), LAYERS)
        assert state.hidden.shape[1] == whole.hidden.shape[1] - 4
        assert_close(backbone.answers(state), backbone.answers(whole))
    backbone.soft_prompt = None


@DECODERS
@pytest.mark.parametrize("kind", METHODS)
def test_every_method_computes_the_same_with_the_prefix_mixed_once(name: str, kind: str) -> None:
    depth = 2 if METHODS[kind][0] == 1 and kind != "siso" else 1
    model = classifier(decoder(name), kind, depth)
    plain = classifier(decoder(name, ()), kind, depth)
    with torch.no_grad():
        expected = plain(batch())
        for _ in range(2):  # the second pass finds the prefix computed
            assert_close(model(batch()), expected)
        assert expected.std(dim=0).min() > 1e-3
        for weight, same in zip(model.method.parameters(), plain.method.parameters(), strict=True):
            same.copy_(weight.mul_(1.1))
        assert_close(model(batch()), plain(batch()), message="the mixed prefix follows the adapter's weights")


@DECODERS
def test_gradients_are_the_same_through_the_mixed_prefix(name: str) -> None:
    found = []
    for constant in (CONSTANT, ()):
        for checkpointing in (False, True):
            backbone = decoder(name, constant)
            backbone.gradient_checkpointing = checkpointing
            model = classifier(backbone, "revmux lora", 1).train()
            model.run_tokens(batch(), torch.tensor([[0, 1, 2, 3]])).scores.square().sum().backward()
            found.append([weight.grad for weight in model.method.parameters()])
            assert all(grad is not None for grad in found[-1])
    backbone.gradient_checkpointing = False
    for other in found[:-1]:
        assert_close(other, found[-1])


@DECODERS
@SIDES
def test_token_split_pools_the_text_only_and_every_input_reads_the_prefix(name: str, side: str) -> None:
    backbone = decoder(name)
    torch.manual_seed(0)
    models = [
        MultiplexedClassifier(
            backbone, build_method("token-split", BackboneShape.of(backbone), width, {"ratio": 2, "lora_rank": 2}), 1
        ).eval()
        for width in (2, 1)
    ]
    models[1].method.load_state_dict(models[0].method.state_dict())
    with torch.no_grad():
        together, alone = models[0](batch(side)), models[1](batch(side))
        assert_close(together, alone)
        assert alone.std(dim=0).min() > 1e-3
        # One input by hand: the plain prefix, then the pooled text, as one sequence without a cache.
        one = {key: tensor[:1] for key, tensor in batch().items()}
        state = backbone.run(backbone.embed(one), 1)
        mixed = models[1].method.multiplex(state.take(torch.tensor([[0]])))
        joined = replace(mixed, segments=None, prefix=state.prefix).whole()
        joined = replace(joined, segments=joined.mask.long())  # windows count positions, not tokens
        answers = backbone.answers(backbone.run(joined, LAYERS))
        own = backbone.own_states(state).unsqueeze(1)
        assert_close(backbone.classify(models[1].method.demultiplex(answers, own))[:, 0], alone[:1])


def test_the_prefix_runs_once_and_again_if_weights_change() -> None:
    backbone = decoder("llama-words")
    model = classifier(backbone, "revmux", 1)
    with torch.inference_mode():
        first = layer_rows(backbone, lambda: model(batch()))
        again = layer_rows(backbone, lambda: model(batch()))
    text = (len(LENGTHS), max(LENGTHS))
    assert first == [(1, len(CONSTANT)), text]
    assert again == [text]
    kept = backbone.constant_prefix()
    assert kept is backbone.constant_prefix()
    with torch.no_grad():
        backbone.word_embeddings.weight.mul_(1.0)
    assert backbone.constant_prefix() is not kept
    with torch.enable_grad():  # tensors of inference mode could not be used in training
        model.train()(batch()).sum().backward()
    backbone.unfreeze_above(0)
    assert backbone.constant_prefix() is None
    assert backbone.embed(batch()).prefix is None
    backbone.freeze()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_that_was_first_used_under_autocast_is_exact(attention: str) -> None:
    model = classifier(decoder("llama-words", attention=attention), "revmux lora", 1)
    expected = classifier(decoder("llama-words", (), attention), "revmux lora", 1)
    model.backbone.freeze()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(batch())
        assert_close(model(batch()), expected(batch()))
        assert float((rough - model(batch())).abs().max()) > 1e-3


def test_inputs_with_another_beginning_run_whole() -> None:
    backbone = decoder("llama-words")
    tokens = batch()
    tokens["input_ids"][2, 1] = 30
    with torch.no_grad():
        state = backbone.embed(tokens)
        assert state.prefix is None
        assert_close(backbone(tokens)[0], backbone(batch())[0])
        short = {key: tensor[:, : len(CONSTANT)] for key, tensor in batch().items()}
        assert backbone.embed(short).prefix is None, "nothing is left to run"


def test_a_ladder_computes_the_same() -> None:
    scores = []
    for constant in (CONSTANT, ()):
        backbone = decoder("llama-words", constant)
        stages = [
            Stage(classifier(backbone, "revmux", 1), 0.9999),
            Stage(classifier(backbone, "revmux lora", 2), 0.9999),
        ]
        with torch.no_grad():
            answers = Ladder(stages).classify(batch())
        scores.append(answers.scores)
        assert bool(answers.fell_back.any())
    assert_close(scores[0], scores[1])


@pytest.mark.parametrize("name", ["t5-words", "bart-words"])
def test_encoder_decoders_refuse_a_constant_prefix(name: str) -> None:
    with pytest.raises(UserError, match=r"reads text in both directions, so the states of its first tokens depend"):
        backbone_of(name).keep_prefix(CONSTANT)


@DECODERS
def test_the_prefix_costs_nothing_per_input(name: str) -> None:
    length, depth = 20, 1
    cached, whole = decoder(name), decoder(name, ())
    model = classifier(cached, "revmux", depth)
    saved = plain_cost(cached, length).per_input / plain_cost(whole, length).per_input
    assert saved == pytest.approx(1 - len(CONSTANT) / length, abs=0.05)
    counted = [count_flops(each, model.method, depth, length) for each in (cached, whole)]
    assert counted[0].per_input < 0.8 * counted[1].per_input
    estimated = [estimate_memory(each, model.method, depth, 8, length).activations for each in (cached, whole)]
    assert estimated[0] < estimated[1]
    assert cached.embed(batch()).prefix is not None, "counting leaves the model itself unchanged"


def prompt(template: str, pair_template: str | None = None) -> Prompt:
    return Prompt("mine", template, pair_template=pair_template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Answer: {text}", "<s>Answer:"),
        ('Answer: "{text}"', "<s>Answer:"),
        ("Answer:\nno\n{text} Answer:", "<s>Answer:\nno"),
        ("Answer:{text}", "<s>"),
        ("{text} Answer:", "<s>"),
    ],
)
def test_the_constant_tokens_end_at_the_last_space_before_the_text(template: str, expected: str) -> None:
    tokenizer = byte_tokenizer()
    found = constant_tokens(prompt(template), tokenizer)
    assert tokenizer.decode(found) == expected
    for text in ("yes", " yes", "\n\nyes", "'s", "...no", ""):
        ids = tokenizer(prompt(template).render(text))["input_ids"]
        assert ids[: len(found)] == found
        assert len(ids) > len(found)


def test_the_constant_tokens_fit_single_texts_and_pairs() -> None:
    tokenizer = byte_tokenizer()
    found = constant_tokens(prompt("Is the sentence {text}", "Is the positive {text} {text_pair}"), tokenizer)
    assert tokenizer.decode(found) == "<s>Is the"
    assert tokenizer.decode(constant_tokens(prompt("Is {text} {text_pair}"), tokenizer)) == "<s>Is"
    assert constant_tokens(prompt("yes no {text} not"), word_tokenizer()) == [2, 3]


def test_a_loaded_prompt_runs_its_beginning_once(tmp_path: Path) -> None:
    folder, file = write_language_model(tmp_path / "llama", "llama"), tmp_path / "mine.yaml"
    file.write_text(f'template: "{TEMPLATE[0]} {TEMPLATE[1]} {{text}} {TEMPLATE[2]}"\nlabels: {{a: [w1], b: [w2]}}\n')
    pretrained = load_pretrained(BackboneConfig(str(folder), max_length=32, prompt=str(file)))
    backbone = pretrained.backbone.freeze()
    tokens = pretrained.encode(["w1 w2 w3", "w4"])
    with torch.no_grad():
        state = backbone.embed(tokens)
        assert state.prefix is not None
        assert state.hidden.shape[1] == tokens["input_ids"].shape[1] - len(state.prefix)
        whole = backbone.run(backbone.embed_whole(tokens), backbone.num_layers)
        assert_close(backbone(tokens), backbone.classify(backbone.answers(whole)[:, 0]))
