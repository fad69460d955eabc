"""The verbalizer: label words get the scores of the whole language model, and invalid ones are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from generative_models import (
    LAYERS,
    LENGTHS,
    MODELS,
    START,
    WITH_WORDS,
    WORDS,
    backbone_of,
    batch,
    side_by_side,
    vocabulary_scores,
    whole,
)
from numeric import assert_close
from torch import Tensor

from revmux import UserError, cut
from revmux.backbone import Verbalizer
from revmux.backbone.verbalizer import VerbalizerHead

pytestmark = pytest.mark.numeric

TWO_TOKENS = Verbalizer(("no", "yes"), ((11, 12, 13), (40,)))


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


def test_wrong_verbalizers_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match="class 'yes' of the verbalizer has no token"):
        Verbalizer(("no", "yes"), ((1,), ()))
    with pytest.raises(UserError, match="'no' and 'yes' of the verbalizer have the same first token 1"):
        Verbalizer(("no", "yes"), ((1, 2), (1, 3)))
    with pytest.raises(UserError, match="has 2 class names but tokens for 1 classes"):
        Verbalizer(("no", "yes"), ((1,),))
    with pytest.raises(UserError, match=r"token id 60 of the verbalizer is outside the vocabulary 0..59"):
        cut(whole("t5-words"), Verbalizer(("no", "yes"), ((1,), (60,))))
