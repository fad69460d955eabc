"""Encoder-decoder and decoder families: cutting a model at any layer keeps its results, for both heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import (
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForSequenceClassification,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from revmux import BackboneShape, HiddenState, MultiplexedClassifier, UserError, build_method, cut
from revmux.backbone import TokenBatch, Verbalizer
from revmux.backbone.generative import GenerativeBackbone, token_positions
from revmux.backbone.verbalizer import VerbalizerHead

pytestmark = pytest.mark.numeric

LAYERS, WIDTH, VOCABULARY, LABELS = 3, 32, 60, 3
PAD, END, START = 1, 2, 3
LENGTHS = (9, 4, 7, 6)
WORDS = Verbalizer(("no", "maybe", "yes"), ((11,), (25,), (40,)))
TWO_TOKENS = Verbalizer(("no", "yes"), ((11, 12, 13), (40,)))
SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": START, "num_labels": LABELS}
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **SPECIAL}
ROTARY: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
T5: dict[str, Any] = {
    **SHAPE,
    "d_kv": 8,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,  # fewer than tokens, so that logarithmic buckets are used
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": START,
}
BART: dict[str, Any] = {
    **SHAPE,
    "decoder_layers": 2,
    "scale_embedding": True,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
}
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5-words": lambda: T5ForConditionalGeneration(tiny_config("t5", **T5)),
    "t5-gated-words": lambda: T5ForConditionalGeneration(
        tiny_config("t5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "t5-head": lambda: T5ForSequenceClassification(tiny_config("t5", **T5)),
    "bart-words": lambda: BartForConditionalGeneration(tiny_config("bart", **BART)),
    "bart-head": lambda: BartForSequenceClassification(tiny_config("bart", **BART)),
    "llama-words": lambda: LlamaForCausalLM(tiny_config("llama", **ROTARY)),
    "llama-head": lambda: LlamaForSequenceClassification(tiny_config("llama", **ROTARY)),
    "mistral-words": lambda: MistralForCausalLM(tiny_config("mistral", **ROTARY, sliding_window=3)),
    "qwen2-words": lambda: Qwen2ForCausalLM(
        tiny_config("qwen2", **ROTARY, use_sliding_window=True, sliding_window=3, layer_types=SLIDING)
    ),
    "qwen3-head": lambda: Qwen3ForSequenceClassification(tiny_config("qwen3", **ROTARY)),
    "gpt2-words": lambda: GPT2LMHeadModel(tiny_config("gpt2", **SHAPE)),
    "gpt2-head": lambda: GPT2ForSequenceClassification(tiny_config("gpt2", **SHAPE)),
}
ALL = pytest.mark.parametrize("name", MODELS)
WITH_WORDS = pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("-words")])
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


@cache
def whole(name: str, attention: str = "sdpa") -> Any:
    """A random model whose weights are large enough that every mask, position and norm affects its scores."""
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            else:
                parameter.add_(0.2 * noise)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.set_attn_implementation(attention)
    return model


def backbone_of(name: str, attention: str = "sdpa", verbalizer: Verbalizer = WORDS) -> GenerativeBackbone:
    backbone = cut(whole(name, attention), verbalizer if name.endswith("-words") else None)
    assert isinstance(backbone, GenerativeBackbone)
    backbone.freeze()
    return backbone


def batch(side: str = "right", extra: int = 0, junk: int = PAD) -> TokenBatch:
    """Inputs of LENGTHS tokens that end with END, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS) + extra
    ids = torch.full((len(LENGTHS), width), junk)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        text = torch.randint(4, VOCABULARY, (length,), generator=generator)
        text[-1] = END
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def is_decoder(name: str) -> bool:
    return name.split("-")[0] in DECODERS


def vocabulary_scores(name: str, tokens: TokenBatch, attention: str = "sdpa", **embeddings: Any) -> Tensor:
    """Return the whole language model's vocabulary scores at the answer, (B, V)."""
    model, rows = whole(name, attention), torch.arange(len(LENGTHS))
    inputs = embeddings or {"input_ids": tokens["input_ids"]}
    if is_decoder(name):
        mask = tokens["attention_mask"]
        last = (torch.arange(mask.shape[1]) * mask).argmax(dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(**inputs, attention_mask=mask, position_ids=positions).logits[rows, last]
    start = torch.full((len(LENGTHS), 1), START)
    return model(**inputs, attention_mask=tokens["attention_mask"], decoder_input_ids=start).logits[:, -1]


@torch.no_grad()
def own_forward(name: str, tokens: TokenBatch, attention: str = "sdpa") -> Tensor:
    """Return the whole model's label scores of right-padded inputs."""
    if name.endswith("-words"):
        return vocabulary_scores(name, tokens, attention)[:, [ids[0] for ids in WORDS.token_ids]]
    return whole(name, attention)(**tokens).logits


def side_by_side(state: HiddenState) -> HiddenState:
    """Put all rows of a state into one sequence, each as its own segment."""
    rows, length = state.mask.shape
    number = torch.arange(1, rows + 1).unsqueeze(1)
    return HiddenState(
        hidden=state.hidden.flatten(0, 1).unsqueeze(0),
        mask=state.mask.view(1, -1),
        answer=(state.answer + (number - 1) * length).view(1, -1),
        depth=state.depth,
        positions=None if state.positions is None else state.positions.reshape(1, -1),
        segments=(state.mask * number).view(1, -1),
        decoder=None if state.decoder is None else side_by_side(state.decoder),
    )


def multiplexer(backbone: GenerativeBackbone, depth: int, seed: int = 0) -> MultiplexedClassifier:
    torch.manual_seed(seed)
    method = build_method("revmux", BackboneShape.of(backbone), 2, {"zero_init": False})
    return MultiplexedClassifier(backbone, method, depth).eval()


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


@WITH_WORDS
def test_verbalizer_scores_are_columns_of_the_vocabulary_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = batch()
    backbone = backbone_of(name, verbalizer=TWO_TOKENS)
    with torch.no_grad():
        full = vocabulary_scores(name, tokens)
        expected = torch.stack([full[:, [11, 12, 13]].mean(dim=1), full[:, 40]], dim=1)

        def refuse(*_: Any) -> Tensor:
            raise AssertionError("the whole vocabulary was scored")

        monkeypatch.setattr(whole(name).lm_head, "forward", refuse)
        assert_close(backbone(tokens), expected)
    assert backbone.num_labels == 2
    assert backbone.label_names == ["no", "yes"]


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


@pytest.mark.parametrize("name", ["t5-words", "bart-words"])
def test_answer_prefix_moves_the_answer_to_a_later_step(name: str) -> None:
    tokens = batch()
    later = replace(WORDS, answer_prefix=(30, 31))
    steps = torch.tensor([[START, 30, 31]]).expand(len(LENGTHS), -1)
    with torch.no_grad():
        full = whole(name)(**tokens, decoder_input_ids=steps).logits[:, -1]
        backbone = backbone_of(name, verbalizer=later)
        assert_close(backbone(tokens), full[:, [11, 25, 40]])
        shared = backbone.answers(backbone.run(side_by_side(backbone.embed(tokens)), LAYERS))[0]
        assert_close(backbone.classify(shared), full[:, [11, 25, 40]])


@WITH_WORDS
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_soft_prompt_computes_the_same_as_the_model_on_longer_embeddings(name: str, side: str) -> None:
    backbone = backbone_of(name)
    limit = backbone.max_length
    with torch.no_grad():
        without = backbone(batch(side))
    assert backbone.soft_prompt is None
    torch.manual_seed(1)
    prompt = backbone.add_soft_prompt(4)
    assert backbone.max_length == limit - 4
    assert "soft_prompt.vectors" in backbone.state_dict()
    tokens = batch("right")
    words = torch.cat([prompt.vectors.expand(4, -1, -1), backbone.word_embeddings(tokens["input_ids"])], dim=1)
    longer = {"attention_mask": torch.cat([torch.ones(4, 4).long(), tokens["attention_mask"]], dim=1)}
    with torch.no_grad():
        expected = vocabulary_scores(name, longer, inputs_embeds=words)[:, [11, 25, 40]]
        for depth in range(LAYERS + 1):
            lower = backbone.run(backbone.embed(batch(side)), depth)
            scores = backbone.classify(backbone.answers(backbone.run(lower, LAYERS))[:, 0])
            assert_close(scores, expected)
    assert not torch.allclose(expected, without, atol=1e-2)


@ALL
def test_only_the_soft_prompt_is_tuned_and_it_is_frozen_with_the_backbone(name: str) -> None:
    backbone = backbone_of(name)
    prompt = backbone.add_soft_prompt(2)
    backbone(batch()).square().sum().backward()
    assert prompt.vectors.grad is not None
    assert (prompt.vectors.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in whole(name).parameters())
    backbone.freeze()
    assert not prompt.vectors.requires_grad
    with torch.no_grad():
        plain = multiplexer(backbone, 1)(batch())
        assert_close(multiplexer(backbone, 1)(batch("right", extra=3)), plain)


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


def test_label_words_are_scored_in_float32_by_a_model_in_bfloat16() -> None:
    verbalizer = Verbalizer(("no", "yes"), ((3,), (4, 5)), bias=(0.001, 0.0))
    head = VerbalizerHead(verbalizer, 8)
    vector, weight = torch.full((1, 16), 1.0), torch.full((8, 16), 1.25)
    weight[3, 0] += 0.125  # 20.125 and 20.000: in bfloat16, both are 20
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(vector.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(scores, torch.tensor([[20.126, 20.0]]), rtol=0, atol=1e-5)


def test_the_verbalizer_is_created_on_the_device_of_the_model() -> None:
    model = MODELS["llama-words"]().to("meta")
    backbone = cut(model, TWO_TOKENS)
    assert {buffer.device.type for name, buffer in backbone.named_buffers() if name.startswith("label_rows")} == {
        "meta"
    }


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


def test_wrong_verbalizers_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match="class 'yes' of the verbalizer has no token"):
        Verbalizer(("no", "yes"), ((1,), ()))
    with pytest.raises(UserError, match="'no' and 'yes' of the verbalizer have the same first token 1"):
        Verbalizer(("no", "yes"), ((1, 2), (1, 3)))
    with pytest.raises(UserError, match="has 2 class names but tokens for 1 classes"):
        Verbalizer(("no", "yes"), ((1,),))
    with pytest.raises(UserError, match=r"token id 60 of the verbalizer is outside the vocabulary 0..59"):
        cut(whole("t5-words"), Verbalizer(("no", "yes"), ((1,), (60,))))


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
