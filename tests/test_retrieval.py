"""The retrieval loss of DataMUX and MUX-PLM: it can be learned, and it ignores padding."""

import pytest
import torch
from tiny_methods import LENGTH, groups_of, randomised, texts, tiny_llama

from revmux import BackboneShape, MultiplexedClassifier, build_method
from revmux.methods.retrieval import sample_questions

pytestmark = pytest.mark.numeric


def test_the_retrieval_loss_decreases_in_training(bert):
    """The adapters alone can learn the warm-up objective if a position determines its tokens."""
    torch.manual_seed(5)
    method = build_method("mux-plm", BackboneShape.of(bert), 2, {"retrieval_fraction": 1.0, "retrieval_weight": 1.0})
    model = MultiplexedClassifier(bert, method, 0).eval()
    tokens, groups = texts(4), groups_of(2)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        output = model.run_tokens(tokens, groups)
        loss = method.auxiliary_loss(bert, output.shared, tokens["input_ids"][groups], tokens["attention_mask"][groups])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_retrieval_ignores_padding(bert):
    method = build_method("mux-plm", BackboneShape.of(bert), 2, {"retrieval_fraction": 1.0})
    model = MultiplexedClassifier(bert, method, 0)
    shared = model.run_tokens(texts(2), torch.tensor([[0, 1]])).shared
    ids = texts(2)["input_ids"].unsqueeze(0)
    assert method.auxiliary_loss(bert, shared, ids, torch.zeros_like(ids)) == 0


@pytest.mark.parametrize("name", ["datamux", "mux-plm"])
def test_retrieval_ignores_padding_on_a_backbone_without_a_padding_token(name):
    """Padded with the end token, as decoders are: only the mask tells padding from the text's own end tokens."""
    backbone = tiny_llama()
    backbone.model.config.pad_token_id = None
    method = randomised(backbone, name, 2, {"retrieval_fraction": 1.0})
    end, mask = 7, texts(2)["attention_mask"]
    assert len(set(mask.sum(dim=1).tolist())) == 2
    ids = torch.full_like(mask, end)  # the last token of each text is an end token too
    tokens, groups = {"input_ids": ids, "attention_mask": mask}, torch.tensor([[0, 1]])
    questions = sample_questions(ids[groups], mask[groups], 1.0)
    asked = torch.zeros(LENGTH, dtype=torch.long)
    asked[questions.positions] = 1
    assert (mask[questions.slots, questions.positions] == 1).all()
    assert asked[: int(mask.sum(dim=1).min())].all(), "the text's own end tokens are sampled"
    shared = MultiplexedClassifier(backbone, method, 0).run_tokens(tokens, groups).shared
    other = ids.where(mask.bool(), 8)
    losses = []
    for padded in (ids, other):
        torch.manual_seed(4)
        losses.append(method.auxiliary_loss(backbone, shared, padded[groups], mask[groups]))
    assert losses[0] == losses[1] != 0
