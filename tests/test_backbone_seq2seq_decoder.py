"""Encoder-decoder and decoder families: a model cut at any layer computes the same as the whole model, also when inputs share a sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from generative_models import (
    ALL,
    BART,
    END,
    LAYERS,
    MODELS,
    PAD,
    ROTARY,
    T5,
    WIDTH,
    WORDS,
    backbone_of,
    batch,
    is_decoder,
    multiplexer,
    side_by_side,
    vocabulary_scores,
    whole,
)
from numeric import assert_close
from tiny_models import tiny_config
from torch import Tensor
from transformers import (
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForTokenClassification,
    T5ForConditionalGeneration,
)

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method, cut
from revmux.backbone import TokenBatch
from revmux.backbone.generative import token_positions

pytestmark = pytest.mark.numeric


@torch.no_grad()
def own_forward(name: str, tokens: TokenBatch, attention: str = "sdpa") -> Tensor:
    """Return the whole model's label scores of right-padded inputs."""
    if name.endswith("-words"):
        return vocabulary_scores(name, tokens, attention)[:, [ids[0] for ids in WORDS.token_ids]]
    return whole(name, attention)(**tokens).logits


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_a_model_cut_at_any_layer_computes_the_same_as_the_whole_model(name: str, attention: str, padding: str) -> None:
    expected = own_forward(name, batch(), attention)
    assert expected.std(dim=0).min() > 0.05, "inputs must have different scores for this test to be meaningful"
    tokens = batch("left" if padding == "left" else "right")
    if padding == "none":  # the longest input alone: no mask is needed, so attention uses its fast paths
        tokens, expected = {key: tensor[:1] for key, tensor in tokens.items()}, expected[:1]
    backbone = backbone_of(name, attention)
    with torch.no_grad():
        for depth in range(LAYERS + 1):
            lower = backbone.run(backbone.embed(tokens), depth)
            assert lower.depth == depth
            scores = backbone.classify(backbone.answers(backbone.run(lower, LAYERS))[:, 0])
            assert_close(scores, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if is_decoder(name)])
def test_a_left_padded_decoder_computes_the_same_as_the_whole_model_with_explicit_positions(name: str) -> None:
    tokens = batch("left")
    positions = (tokens["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = (
            vocabulary_scores(name, tokens)[:, [11, 25, 40]]
            if name.endswith("-words")
            else whole(name)(**tokens, position_ids=positions).logits
        )
        assert_close(backbone_of(name)(tokens), expected)


def test_a_classifier_reads_the_same_token_as_the_model_when_texts_end_with_the_padding_token() -> None:
    tokens = batch()
    ids = torch.where(tokens["input_ids"] == END, PAD, tokens["input_ids"])
    tokens = {**tokens, "input_ids": ids}
    with torch.no_grad():
        expected = whole("llama-head")(**tokens).logits
        assert_close(backbone_of("llama-head")(tokens), expected)


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_inputs_side_by_side_in_one_sequence_get_the_same_answers_as_alone(name: str, attention: str) -> None:
    backbone = backbone_of(name, attention)
    with torch.no_grad():
        for depth in (0, 2):
            lower = backbone.run(backbone.embed(batch()), depth)
            alone = backbone.answers(backbone.run(lower, LAYERS))[:, 0]
            shared = backbone.answers(backbone.run(side_by_side(lower), LAYERS))[0]
            assert_close(shared, alone)


def test_the_sliding_window_of_segments_counts_positions_within_a_segment() -> None:
    backbone = backbone_of("mistral-words")
    state = side_by_side(backbone.embed({key: tensor[:1] for key, tensor in batch().items()}))
    assert state.positions is not None
    with torch.no_grad():
        near = backbone.run(state, LAYERS).hidden
        sparse = replace(state, positions=state.positions * 3)  # every other token is out of the window of 3
        alone = [
            backbone.run(sparse.map(lambda tensor, place=place: tensor[:, place : place + 1]), LAYERS).hidden
            for place in range(state.mask.shape[1])
        ]
        assert_close(backbone.run(sparse, LAYERS).hidden, torch.cat(alone, dim=1))
    assert not torch.allclose(near, torch.cat(alone, dim=1), atol=1e-2)


@ALL
def test_gradients_reach_the_adapters_and_no_frozen_weight(name: str) -> None:
    backbone = backbone_of(name)
    model = multiplexer(backbone, 1).train()
    assert not backbone.training
    model(batch()).square().sum().backward()
    for key, parameter in model.method.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    assert all(parameter.grad is None for parameter in backbone.parameters())


@ALL
def test_gradients_are_the_same_with_gradient_checkpointing(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        backbone = backbone_of(name)
        backbone.gradient_checkpointing = checkpointing
        model = multiplexer(backbone, 1)
        model(batch()).square().sum().backward()
        found.append([parameter.grad for parameter in model.method.parameters()])
    assert_close(found[1], found[0])


@ALL
@pytest.mark.parametrize("side", ["right", "left"])
def test_multiplexed_answers_do_not_depend_on_padding(name: str, side: str) -> None:
    model = multiplexer(backbone_of(name), 1)
    with torch.no_grad():
        plain = model(batch(side))
        assert_close(model(batch(side, extra=5)), plain)
        for junk in (17, END):
            assert_close(model(batch(side, junk=junk)), plain)
    assert plain.std(dim=0).min() > 1e-3


@ALL
def test_encoder_decoders_with_label_words_have_one_answer_per_group(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of(name)
    assert backbone.shared_answer == (name.endswith("-words") and not is_decoder(name))
    model = multiplexer(backbone, 1)
    demultiplex, shapes = model.method.demultiplex, []

    def record(answers: Tensor, own: Tensor) -> Tensor:
        shapes.append(tuple(answers.shape))
        return demultiplex(answers, own)

    monkeypatch.setattr(model.method, "demultiplex", record)
    with torch.no_grad():
        model(batch())
    assert shapes == [(2, 1 if backbone.shared_answer else 2, WIDTH)]


@pytest.mark.parametrize("name", ["t5-words", "t5-head", "bart-words", "bart-head"])
def test_the_decoder_runs_once_per_group(name: str) -> None:
    backbone: Any = backbone_of(name)
    rows: list[int] = []
    handle = backbone.decoder_layers()[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        multiplexer(backbone, 1)(batch())
    handle.remove()
    assert rows == [2]


@ALL
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_own_answer_is_read_at_the_last_token(name: str, side: str) -> None:
    backbone = backbone_of(name)
    backbone.add_soft_prompt(3)
    with torch.no_grad():
        state = backbone.embed(batch(side))
        expected = torch.stack([row[mask][-1] for row, mask in zip(state.hidden, state.mask, strict=True)])
        assert_close(backbone.own_answers(state), backbone.normalize(expected))
    assert (state.positions is None) == (name.split("-")[0] in ("bart", "gpt2"))


@pytest.mark.parametrize("name", [name for name in MODELS if is_decoder(name)])
def test_the_own_answer_at_the_last_layer_is_what_the_head_reads(name: str) -> None:
    backbone = backbone_of(name)
    with torch.no_grad():
        state = backbone.run(backbone.embed(batch()), backbone.num_layers)
        assert_close(backbone.own_answers(state), backbone.answers(state)[:, 0])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if is_decoder(name) or name.startswith("t5")])
def test_one_huge_token_does_not_hide_the_others_from_an_exit_head(name: str, pooled: bool) -> None:
    backbone = backbone_of(name)
    method = build_method("exit-head", BackboneShape.of(backbone), 1, {"layer": 1, "attention_pooling": pooled})
    with torch.no_grad():
        state = backbone.run(backbone.embed(batch()), 1)
        state.hidden[:, 0] *= 1e4  # as the first token of a pretrained LLaMA
        mean = method.read(backbone, state)[0, 0, backbone.hidden_size :]
        assert_close(mean, backbone.normalize(state.hidden)[0][state.mask[0]].mean(dim=0))
        assert mean.abs().max() < 10


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("-words") or is_decoder(name)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_token_split_does_not_depend_on_padding_or_neighbours(name: str, side: str) -> None:
    backbone = backbone_of(name)
    torch.manual_seed(0)
    model = MultiplexedClassifier(backbone, build_method("token-split", BackboneShape.of(backbone), 2), 1).eval()
    with torch.no_grad():
        plain = model(batch(side))
        assert_close(model(batch(side, extra=6, junk=17)), plain)
        turned = model(batch(side), torch.tensor([[2, 0], [3, 1]]))
        assert_close(turned, plain)
    assert plain.std(dim=0).min() > 1e-2


def test_positions_count_from_the_first_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert token_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_wrong_heads_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no sequence classification head.*verbalizer"):
        cut(whole("llama-words"))
    with pytest.raises(UserError, match=r"LlamaForTokenClassification has no sequence classification head"):
        cut(LlamaForTokenClassification(tiny_config("llama", **ROTARY)))
    with pytest.raises(UserError, match=r"BartForSequenceClassification scores no vocabulary"):
        cut(whole("bart-head"), WORDS)
    with pytest.raises(UserError, match=r"BartForCausalLM has no encoder"):
        cut(BartForCausalLM(tiny_config("bart", **BART)), WORDS)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=9, **sizes))
    with pytest.raises(UserError, match=r"bert is not a language model.*choose from bart, gpt2, llama"):
        cut(encoder, WORDS)
    with pytest.raises(UserError, match=r"answer_prefix \[5\] is for encoder-decoders"):
        cut(whole("gpt2-words"), replace(WORDS, answer_prefix=(5,)))


def test_wrong_inputs_are_refused_with_a_remedy() -> None:
    tokens = batch()
    tokens["input_ids"][1, :] = 9
    with pytest.raises(UserError, match=r"no end-of-sequence token \(2\).*special tokens"):
        backbone_of("bart-head")(tokens)
    with pytest.raises(UserError, match=r"soft prompt length is 64; choose 1..63"):
        backbone_of("t5-words").add_soft_prompt(64)
    settings = {key: value for key, value in T5.items() if key != "decoder_start_token_id"}
    model = T5ForConditionalGeneration(tiny_config("t5", **settings))
    model.generation_config = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        cut(model, WORDS)
