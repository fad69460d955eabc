"""A soft prompt: the scores are those of the model on longer embeddings, and no other weight is tuned."""

from __future__ import annotations

import pytest
import torch
from generative_models import ALL, LAYERS, WITH_WORDS, backbone_of, batch, multiplexer, vocabulary_scores, whole
from numeric import assert_close

pytestmark = pytest.mark.numeric


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
