"""Encoder families: a model cut at any layer computes the same as the whole model, also when inputs share a sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
)

from revmux import BackboneShape, HiddenState, MultiplexedClassifier, UserError, build_method, cut
from revmux.backbone import Backbone, TokenBatch, supported_model_types
from revmux.backbone.registry import BACKBONES

pytestmark = pytest.mark.numeric

LAYERS, WIDTH, VOCABULARY, LENGTH, LABELS = 4, 32, 50, 14, 3
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_labels": LABELS}
BERT_LIKE: dict[str, Any] = {
    **SHAPE,
    "type_vocab_size": 2,
}
DEBERTA = {
    **BERT_LIKE,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,  # fewer than tokens, so that logarithmic buckets are used
    "pos_att_type": "p2c|c2p",
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "pooler_dropout": 0.1,
}
MODERNBERT: dict[str, Any] = {
    **SHAPE,
    "local_attention": 6,  # shorter than the inputs
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "mlp_dropout": 0.1,
    "classifier_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: tiny_config("bert", **BERT_LIKE),
    "roberta": lambda: tiny_config("roberta", **BERT_LIKE),
    "distilbert": lambda: tiny_config("distilbert", **SHAPE),
    "electra": lambda: tiny_config("electra", **BERT_LIKE, embedding_size=16),
    "electra-unprojected": lambda: tiny_config("electra", **BERT_LIKE, embedding_size=WIDTH),
    "deberta-v2": lambda: tiny_config("deberta-v2", **DEBERTA),
    "deberta-v2-convolution": lambda: tiny_config(
        "deberta-v2",
        **{**DEBERTA, "share_att_key": False, "position_biased_input": True},
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "deberta-v2-absolute": lambda: tiny_config("deberta-v2", **BERT_LIKE),
    "modernbert": lambda: tiny_config("modernbert", **MODERNBERT),
    "modernbert-mean": lambda: tiny_config("modernbert", **MODERNBERT, classifier_pooling="mean"),
    "modernbert-global": lambda: tiny_config("modernbert", **MODERNBERT, layer_types=["full_attention"] * LAYERS),
}
IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("sdpa", "eager")
    if implementation == "eager" or not family.startswith("deberta")  # has no SDPA
]
EXPLICIT_POSITIONS = ["deberta-v2", "modernbert", "modernbert-mean"]


def build(config: Any, implementation: str) -> nn.Module:
    """A model with weights large enough that a wrong mask or position moves the scores far beyond rounding."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def frozen(family: str, implementation: str = "eager") -> Backbone:
    return cut(build(FAMILIES[family](), implementation)).freeze()


def token_batch(backbone: Backbone, lengths: list[int], seed: int = 0) -> TokenBatch:
    """Random inputs, right-padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    tokens = {"input_ids": ids.where(mask.bool(), torch.tensor(backbone.config.pad_token_id)), "attention_mask": mask}
    if getattr(backbone.config, "type_vocab_size", 0) > 1:
        tokens["token_type_ids"] = (torch.arange(max(lengths)) > 4).long().expand_as(ids)
    return tokens


def pad(backbone: Backbone, tokens: TokenBatch, columns: int) -> TokenBatch:
    fill = {"input_ids": backbone.config.pad_token_id}
    return {name: nn.functional.pad(tensor, (0, columns), value=fill.get(name, 0)) for name, tensor in tokens.items()}


def answer(backbone: Backbone, state: HiddenState) -> Tensor:
    """Return the scores of a state after the remaining layers, (B, A, C)."""
    return backbone.classify(backbone.answers(backbone.run(state, backbone.num_layers)))


def side_by_side(first: HiddenState, second: HiddenState) -> HiddenState:
    """Put each row's two inputs into one sequence, as a method that splits tokens does."""
    states = (first, second)
    shape = first.hidden.shape[1]

    def join(name: str) -> Tensor | None:
        parts = [getattr(state, name) for state in states]
        return None if parts[0] is None else torch.cat(parts, dim=1)

    spans = None
    if first.spans is not None and second.spans is not None:
        spans = torch.cat(
            [
                nn.functional.pad(first.spans, (0, second.hidden.shape[1])),
                nn.functional.pad(second.spans, (shape, 0)),
            ],
            dim=1,
        )  # (B, 2, S)
    hidden, mask = join("hidden"), join("mask")
    assert hidden is not None
    assert mask is not None
    return HiddenState(
        hidden=hidden,
        mask=mask,
        answer=torch.cat([first.answer, second.answer + shape], dim=1),
        depth=first.depth,
        positions=join("positions"),
        segments=torch.cat([first.mask.long(), second.mask.long() * 2], dim=1),
        spans=spans,
    )


@pytest.mark.parametrize("lengths", [[LENGTH, LENGTH], [LENGTH, 9, 2]], ids=["full", "padded"])
@pytest.mark.parametrize("depth", range(LAYERS + 1))
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_a_backbone_cut_at_any_layer_computes_the_same_as_the_whole_model(
    family: str, implementation: str, depth: int, lengths: list[int]
) -> None:
    backbone = frozen(family, implementation)
    tokens = token_batch(backbone, lengths)
    whole = backbone.model(**tokens).logits
    lower = backbone.run(backbone.embed(tokens), depth)
    assert lower.depth == depth
    assert_close(answer(backbone, lower)[:, 0], whole)
    assert torch.equal(backbone(tokens), whole)


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_tokens_without_a_mask_are_all_read(family: str, implementation: str) -> None:
    backbone = frozen(family, implementation)
    ids = {"input_ids": token_batch(backbone, [LENGTH, LENGTH])["input_ids"]}
    assert torch.equal(backbone(ids), backbone.model(**ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_come_from_the_configuration(family: str) -> None:
    backbone = frozen(family)
    assert backbone.hidden_size == WIDTH
    assert backbone.readout_size == WIDTH
    assert backbone.num_layers == LAYERS
    assert backbone.num_labels == LABELS
    tokens = token_batch(backbone, [backbone.max_length])
    assert backbone(tokens).shape == (1, LABELS)
    assert backbone.max_length == (38 if family == "roberta" else 40)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_readout_returns_the_input_of_the_last_linear_layer(family: str) -> None:
    backbone = frozen(family)
    tokens = token_batch(backbone, [LENGTH, 9])
    head = backbone.model.classifier
    last = head.out_proj if hasattr(head, "out_proj") else head
    seen: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    try:
        backbone.model(**tokens)
    finally:
        hook.remove()
    vector = backbone.readout(backbone.answers(backbone.run(backbone.embed(tokens), LAYERS)))[:, 0]
    assert torch.equal(vector, seen[0])
    assert torch.equal(backbone.score(vector), seen[1])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dropout_is_applied_only_in_training_mode_and_where_the_model_has_it(family: str) -> None:
    backbone = cut(build(FAMILIES[family](), "eager")).freeze()
    tokens = token_batch(backbone, [LENGTH, 9])
    settled = backbone(tokens)
    backbone.train()
    torch.manual_seed(1)
    dropped = backbone(tokens)
    torch.manual_seed(1)
    assert torch.equal(dropped, backbone.model(**tokens).logits)
    assert not torch.allclose(dropped, settled, atol=1e-3)
    assert torch.equal(backbone.freeze()(tokens), settled)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_gradients_pass_through_frozen_layers(family: str, implementation: str, depth: int) -> None:
    backbone = frozen(family, implementation)
    lower = backbone.run(backbone.embed(token_batch(backbone, [LENGTH, 2])), depth)
    mixed = lower.hidden.clone().requires_grad_()
    answer(backbone, replace(lower, hidden=mixed)).square().sum().backward()
    assert mixed.grad is not None
    assert torch.isfinite(mixed.grad).all()
    assert (mixed.grad[lower.mask].abs().amax(dim=-1) > 0).all()
    assert (mixed.grad[~lower.mask] == 0).all()
    assert all(weight.grad is None for weight in backbone.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_gradients_are_the_same_with_gradient_checkpointing(family: str) -> None:
    backbone = frozen(family)
    lower = backbone.embed(token_batch(backbone, [LENGTH, 9]))

    def gradient() -> Tensor:
        mixed = lower.hidden.clone().requires_grad_()
        answer(backbone, replace(lower, hidden=mixed)).square().sum().backward()
        assert mixed.grad is not None
        return mixed.grad

    plain = gradient()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    backbone.gradient_checkpointing = True
    hook = backbone.layer(LAYERS - 1).register_forward_pre_hook(count)
    try:
        assert_close(gradient(), plain)
    finally:
        backbone.gradient_checkpointing = False
        hook.remove()
    assert calls == 2, "the layer must run again in the backward pass"


ANSWERS_ALONE = {"bert", "roberta", "electra", "distilbert"}


@pytest.mark.parametrize("depth", [0, LAYERS - 1])
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_computing_only_the_answers_in_the_last_layer_gives_the_same_result(
    family: str, implementation: str, depth: int
) -> None:
    backbone = frozen(family, implementation)
    first, second = (backbone.embed(token_batch(backbone, lengths)) for lengths in ([LENGTH, 9], [3, LENGTH]))
    for lower in (first, side_by_side(first, second)):
        found = []
        for run in (backbone.run, backbone.run_to_answers):
            hidden = lower.hidden.clone().requires_grad_()
            upper = run(backbone.run(replace(lower, hidden=hidden), depth), LAYERS)
            scores = backbone.classify(backbone.answers(upper))  # (B, A, C)
            scores.square().sum().backward()
            assert hidden.grad is not None
            found.append((scores.detach(), hidden.grad))
        assert_close(found[1], found[0])
        assert (upper.hidden.shape[1] == lower.answer.shape[1]) == (backbone.config.model_type in ANSWERS_ALONE)
        assert upper.depth == LAYERS


def test_with_dropout_the_whole_last_layer_is_computed() -> None:
    backbone = cut(build(FAMILIES["bert"](), "sdpa")).train()
    state = backbone.embed(token_batch(backbone, [LENGTH, 9]))
    assert backbone.run_to_answers(state, LAYERS).hidden.shape[1] == LENGTH


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_padding_columns_do_not_change_the_scores(family: str, implementation: str) -> None:
    backbone = frozen(family, implementation)
    tokens = token_batch(backbone, [LENGTH, 9, 2])
    assert_close(backbone(pad(backbone, tokens, 7)), backbone(tokens))


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_inputs_side_by_side_in_one_sequence_get_the_same_answers_as_alone(
    family: str, implementation: str, depth: int
) -> None:
    backbone = frozen(family, implementation)
    first = backbone.run(backbone.embed(token_batch(backbone, [LENGTH, 5], seed=1)), depth)
    second = backbone.run(backbone.embed(token_batch(backbone, [3, 10], seed=2)), depth)
    together = answer(backbone, side_by_side(first, second))  # (2, 2, C)
    assert_close(together[:, :1], answer(backbone, first))
    assert_close(together[:, 1:], answer(backbone, second))


@pytest.mark.parametrize(("family", "implementation"), [row for row in IMPLEMENTATIONS if row[0] in EXPLICIT_POSITIONS])
@torch.no_grad()
def test_dropping_tokens_does_not_move_the_other_tokens(family: str, implementation: str) -> None:
    """Dropping tokens equals masking them: the others keep their positions, alone and side by side."""
    backbone = frozen(family, implementation)
    tokens = token_batch(backbone, [LENGTH, LENGTH])
    kept = torch.tensor([[0, 1, 3, 4, 8, 9, 12], [0, 2, 3, 5, 6, 7, 13]])  # (B, S')
    visible = torch.zeros_like(tokens["attention_mask"]).scatter(1, kept, 1)
    expected = backbone({**tokens, "attention_mask": visible})
    assert not torch.allclose(expected, backbone(tokens), atol=1e-3)

    whole = backbone.embed(tokens)
    assert whole.positions is not None
    rows = torch.arange(len(kept)).unsqueeze(1)
    short = replace(
        whole,
        hidden=whole.hidden[rows, kept],
        mask=whole.mask[rows, kept],
        positions=whole.positions[rows, kept],
        spans=None if whole.spans is None else whole.spans[rows, 0, kept].unsqueeze(1),
    )
    assert_close(answer(backbone, short)[:, 0], expected)
    together = answer(backbone, side_by_side(short, short))
    assert_close(together, torch.stack([expected, expected], dim=1))


@pytest.mark.parametrize(("family", "implementation"), [row for row in IMPLEMENTATIONS if row[0] in EXPLICIT_POSITIONS])
@torch.no_grad()
def test_segments_stay_separate_when_positions_continue_across_them(family: str, implementation: str) -> None:
    """Only distances matter, so the second input may start where the first one ended."""
    backbone = frozen(family, implementation)
    first, second = (backbone.embed(token_batch(backbone, [LENGTH, LENGTH], seed=seed)) for seed in (1, 2))
    restarted = side_by_side(first, second)
    running = replace(restarted, positions=torch.arange(2 * LENGTH).expand(2, -1))
    assert_close(answer(backbone, running), answer(backbone, restarted))


@pytest.mark.parametrize("prefill_layers", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_multiplexed_answers_do_not_depend_on_padding(family: str, prefill_layers: int) -> None:
    backbone = frozen(family, "eager")
    torch.manual_seed(0)
    method = build_method("revmux", BackboneShape.of(backbone), 2, {"zero_init": False})
    model = MultiplexedClassifier(backbone, method, prefill_layers).eval()
    tokens = token_batch(backbone, [LENGTH, 4, 9, 9])
    scores = model(tokens)
    assert scores.shape == (4, LABELS)
    assert_close(model(pad(backbone, tokens, 5)), scores)


@torch.no_grad()
def test_mean_pooling_averages_each_input_over_its_own_tokens() -> None:
    backbone = frozen("modernbert-mean", "sdpa")
    assert BackboneShape.of(backbone).shared_answer is False
    assert BackboneShape.of(frozen("modernbert", "sdpa")).shared_answer is True
    method = build_method("revmux", BackboneShape.of(backbone), 2)
    prefilled = backbone.run(backbone.embed(token_batch(backbone, [LENGTH, 4])), 2)
    mixed = method.multiplex(prefilled.take(torch.tensor([[0, 1]])))
    upper = backbone.run(mixed, LAYERS)
    normed = backbone.model.model.final_norm(upper.hidden)
    own = torch.stack([normed[0].mean(dim=0), normed[0, :4].mean(dim=0)])  # (2, d)
    assert_close(backbone.answers(upper)[0], own)
    assert_close(backbone.own_answers(prefilled)[1], backbone.normalize(prefilled.hidden)[1, :4].mean(dim=0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert", "modernbert-mean"])
def test_the_own_answer_at_the_last_layer_is_what_the_head_reads(family: str) -> None:
    backbone = frozen(family, "sdpa")
    state = backbone.run(backbone.embed(token_batch(backbone, [LENGTH, 4])), LAYERS)
    assert_close(backbone.own_answers(state), backbone.answers(state)[:, 0])


def test_an_unsupported_architecture_is_refused_with_the_list_of_supported_ones() -> None:
    class Other(nn.Module):
        config = SimpleNamespace(model_type="other-net")

    families = {"bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"}
    assert families <= set(supported_model_types())
    with pytest.raises(UserError, match="other-net") as raised:
        cut(Other())
    message = str(raised.value)
    assert all(family in message for family in families)
    assert "docs/add-a-backbone.md" in message
    assert "\n" not in message


@torch.no_grad()
def test_the_documented_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKBONES, "_entries", dict(BACKBONES._entries))  # the example is registered only in this test
    page = Path(__file__).parents[1] / "docs" / "add-a-backbone.md"
    source = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(source) == 1
    exec(compile(source[0], str(page), "exec"), {"__name__": "documented_example"})
    config = tiny_config("mpnet", **SHAPE)
    backbone = cut(build(config, "eager")).freeze()
    tokens = token_batch(backbone, [LENGTH, 9])
    for depth in range(LAYERS + 1):
        lower = backbone.run(backbone.embed(tokens), depth)
        assert_close(answer(backbone, lower)[:, 0], backbone.model(**tokens).logits)
    first = backbone.embed(token_batch(backbone, [LENGTH], seed=1))
    second = backbone.embed(token_batch(backbone, [6], seed=2))
    together = answer(backbone, side_by_side(first, second))
    assert_close(together[:, 1:], answer(backbone, second))
