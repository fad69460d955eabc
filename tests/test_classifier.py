"""Classification in a notebook: texts are grouped by length and answered in order, with the recorded backbone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from numeric import approx, assert_close

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.adapters.classifier import TextClassifier
from revmux.adapters.folder import describe_adapter, save_adapter
from revmux.pretrained.config import EMBEDDED_NAME, BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained

pytestmark = pytest.mark.numeric

TEXTS = ["w1 w5", "w2 w9 w3 w4 w8", "w7", "w30 w1 w2 w3", "w11 w12 w13"]
BY_LENGTH = [1, 3, 4, 0, 2]


def build(
    pretrained: Pretrained, name: str = "revmux", num_inputs: int = 2, **options: object
) -> MultiplexedClassifier:
    torch.manual_seed(3)
    method = build_method(name, BackboneShape.of(pretrained.backbone), num_inputs, options)
    return MultiplexedClassifier(pretrained.backbone, method, 1).eval()


@torch.no_grad()
def expected(model: MultiplexedClassifier, pretrained: Pretrained, groups: list[list[int]]) -> torch.Tensor:
    tokens = dict(pretrained.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    return model(tokens, torch.tensor(groups))


@pytest.mark.parametrize(
    ("name", "num_inputs", "groups"),
    [
        ("revmux", 2, [[1, 3], [4, 0], [2, 2]]),
        ("revmux", 4, [[1, 3, 4, 0], [2, 2, 2, 2]]),
        ("datamux", 2, [[1, 3], [4, 0], [2, 2]]),
        ("exit-head", 1, [[0], [1], [2], [3], [4]]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_texts_of_similar_length_share_a_group_and_the_last_group_is_filled(
    name: str, num_inputs: int, groups: list[list[int]], batch_size: int, tiny_pretrained: Pretrained
) -> None:
    options = {"tune_backbone": False} if name == "datamux" else {}
    model = build(tiny_pretrained, name, num_inputs, **options)
    found = TextClassifier(model, tiny_pretrained, 16).scores(TEXTS, batch_size=batch_size)
    assert_close(found, expected(model, tiny_pretrained, groups))


def test_labels_are_returned_with_their_scores_best_first(tiny_pretrained: Pretrained) -> None:
    classifier = TextClassifier(build(tiny_pretrained), tiny_pretrained, 16)
    scores = classifier.scores(TEXTS).softmax(-1)
    for own, ranked in zip(scores, classifier(TEXTS), strict=True):
        assert [score for _, score in ranked] == approx(sorted(own.tolist(), reverse=True))
        assert ranked[0][0] == classifier.label_names[int(own.argmax())]
    assert [len(ranked) for ranked in classifier(TEXTS, top_k=1)] == [1] * len(TEXTS)


def test_text_pairs_are_encoded_as_in_training(tiny_pretrained: Pretrained) -> None:
    model = build(tiny_pretrained)
    found = TextClassifier(model, tiny_pretrained, 16).scores([("w1 w2", "w3"), ("w4", "w5 w6")])
    tokens = dict(tiny_pretrained.tokenizer(["w1 w2", "w4"], ["w3", "w5 w6"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        assert_close(found, model(tokens))


def test_a_pair_is_refused_if_the_adapter_was_trained_on_single_texts(tiny_pretrained: Pretrained) -> None:
    classifier = TextClassifier(build(tiny_pretrained), tiny_pretrained, 16, pairs=False)
    with pytest.raises(UserError, match="trained on single texts"):
        classifier.scores([("w1", "w2")])


def test_long_texts_are_truncated_unless_truncation_is_disabled(tiny_pretrained: Pretrained) -> None:
    classifier = TextClassifier(build(tiny_pretrained), tiny_pretrained, 5)
    cut = classifier.scores(["w1 w2 w3 w4 w5", "w6"])
    assert_close(cut, classifier.scores(["w1 w2 w3", "w6"]))
    with pytest.raises(UserError, match="7 tokens, but at most 5 tokens are allowed"):
        classifier.scores(["w1 w2 w3 w4 w5"], truncate=False)


def test_tokens_added_by_the_method_reduce_the_maximum_text_length(tiny_pretrained: Pretrained) -> None:
    model = build(tiny_pretrained, "datamux", 2, tune_backbone=False)
    classifier = TextClassifier(model, tiny_pretrained, 40)
    assert classifier.max_length == 37
    assert classifier.scores([" ".join(["w1"] * 50)]).isfinite().all()


def test_an_empty_list_gives_no_scores_and_a_single_text_is_refused(tiny_pretrained: Pretrained) -> None:
    classifier = TextClassifier(build(tiny_pretrained), tiny_pretrained, 16)
    assert classifier.scores([]).shape == (0, 2)
    assert classifier([]) == []
    with pytest.raises(UserError, match=r"texts is a single string, 'w1 w2'; pass a list, such as \[text\]"):
        classifier.scores("w1 w2")
    with pytest.raises(UserError, match="empty text"):
        classifier.scores(["w1", ""])


def test_a_backbone_can_be_given_by_name_by_folder_or_as_an_object(
    tiny_pretrained: Pretrained, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = build(tiny_pretrained)
    folder = save_adapter(
        model, describe_adapter(model, tiny_pretrained, 12, {"source": "toy.csv"}), tmp_path / "adapter"
    )
    wanted = TextClassifier(model, tiny_pretrained, 12).scores(TEXTS)
    ways = [tiny_model_folder, str(tiny_model_folder), BackboneConfig(str(tiny_model_folder)), tiny_pretrained]
    for backbone in ways:
        classifier = TextClassifier.from_pretrained(folder, backbone)
        assert classifier.max_length == 12
        assert_close(classifier.scores(TEXTS), wanted)


def test_the_backbone_has_the_dtype_of_training_unless_the_caller_chooses_another(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    half = load_pretrained(BackboneConfig(str(tiny_model_folder), max_length=16, dtype="bfloat16"))
    half.backbone.freeze()
    model = build(half)
    folder = save_adapter(model, describe_adapter(model, half, 16, {"source": "toy.csv"}), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        classifier = TextClassifier.from_pretrained(folder, tiny_model_folder)
    assert classifier.model.backbone.dtype == torch.bfloat16
    assert torch.equal(classifier.scores(TEXTS), TextClassifier(model, half, 16).scores(TEXTS))
    with pytest.warns(UserWarning, match="trained on a bfloat16 backbone, but the given backbone is float32"):
        chosen = TextClassifier.from_pretrained(folder, BackboneConfig(str(tiny_model_folder)))
    assert chosen.model.backbone.dtype == torch.float32


def test_the_embedded_backbone_is_found_by_its_record(tmp_path: Path) -> None:
    folder = tmp_path / "task-model"
    pretrained = load_pretrained(BackboneConfig(), ["no", "yes"])
    model = build(pretrained)
    save_adapter(model, describe_adapter(model, pretrained, 16, {"source": "toy.csv"}), folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model"]["name"] == EMBEDDED_NAME
    with pytest.raises(UserError, match="without a trained classification head"):
        TextClassifier.from_pretrained(folder)  # an adapter folder, but its method cannot classify
