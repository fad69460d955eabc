"""The token split: what it pools and keeps, and that its inputs do not see each other."""

import pytest
import torch
from numeric import assert_close
from tiny_methods import randomised, texts

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_token_split_inputs_do_not_attend_to_each_other(backbone, request):
    cut_model = request.getfixturevalue(backbone)
    model = MultiplexedClassifier(cut_model, randomised(cut_model, "token-split", 2, {}), 1).eval()
    tokens = texts(3)
    scores = model.run_tokens(tokens, torch.tensor([[0, 1], [0, 2]])).scores
    assert_close(scores[0, 0], scores[1, 0])


@pytest.mark.parametrize("num_inputs", [2, 4, 8])
def test_token_split_costs_what_mixing_costs(bert, num_inputs):
    method = randomised(bert, "token-split", num_inputs, {})
    model = MultiplexedClassifier(bert, method, 1)
    prefilled = model.prefill(texts(num_inputs, length=33))
    shared = model.multiplex(prefilled, torch.arange(num_inputs).unsqueeze(0))
    assert shared.hidden.shape == (1, 32 + num_inputs, 80)  # 33 - 1 tokens pooled, N answer tokens whole


def test_token_split_is_initialised_as_the_mean_of_neighbouring_tokens(bert):
    torch.manual_seed(4)
    model = MultiplexedClassifier(bert, build_method("token-split", BackboneShape.of(bert), 4), 1).eval()
    tokens = {"input_ids": torch.randint(1, 50, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    prefilled = model.prefill(tokens)
    shared = model.multiplex(prefilled, torch.arange(4).unsqueeze(0)).hidden.view(4, 3, 80)
    assert_close(shared[:, 0], prefilled.hidden[:, 0])
    assert_close(shared[:, 1], prefilled.hidden[:, 1:5].mean(dim=1))
    assert_close(shared[:, 2], prefilled.hidden[:, 5:9].mean(dim=1))


def test_token_split_keeps_the_most_relevant_tokens_whole(bert):
    torch.manual_seed(4)
    method = build_method("token-split", BackboneShape.of(bert), 1, {"ratio": 3, "kept_tokens": 2})
    model = MultiplexedClassifier(bert, method, 1).eval()
    tokens = {"input_ids": torch.randint(1, 50, (1, 9)), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    prefilled = model.prefill(tokens)
    first, second = sorted((1 + method.relevance(prefilled.hidden)[0, 1:, 0].topk(2).indices).tolist())
    shared = model.multiplex(prefilled, torch.tensor([[0]])).hidden[0]  # answer, two kept, ⌈6 / 3⌉ pooled
    rest = [place for place in range(1, 9) if place not in (first, second)]
    hidden = prefilled.hidden[0]
    expected = [hidden[0], hidden[first], hidden[second], hidden[rest[:3]].mean(dim=0), hidden[rest[3:]].mean(dim=0)]
    assert_close(shared, torch.stack(expected))


def test_token_split_is_refused_if_the_decoder_reads_the_text(bert):
    method = build_method("token-split", BackboneShape.of(bert), 2)
    state = bert.embed(texts(2)).take(torch.tensor([[0, 1]]))
    with pytest.raises(UserError, match="decoder also reads the text"):
        method.multiplex(type(state)(state.hidden, state.mask, state.answer, 0, decoder=state))
