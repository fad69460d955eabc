"""Adapters on disk: a round trip keeps the scores, and adapters that do not fit are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from safetensors.torch import load_file, save_file
from tiny_models import tiny_classifier, write_tiny_model
from torch import Tensor

import revmux
from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.adapters import folder as artifact
from revmux.adapters.config import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME, AdapterConfig, load_adapter_config
from revmux.adapters.folder import describe_adapter, load_adapter, save_adapter
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import LossConfig, OptimConfig
from revmux.utils import files

pytestmark = pytest.mark.numeric

TEXTS = ["w1 w5 w6", "w2 w9", "w7", "w30 w1 w2 w3", "w11 w12"]


def adapter(
    pretrained: Pretrained, name: str = "revmux", num_inputs: int = 2, options: dict | None = None
) -> MultiplexedClassifier:
    torch.manual_seed(3)
    method = build_method(name, BackboneShape.of(pretrained.backbone), num_inputs, options)
    with torch.no_grad():
        for (
            parameter
        ) in method.parameters():  # no weight keeps its initial value, which loading could reproduce by accident
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return MultiplexedClassifier(pretrained.backbone, method, 1).eval()


def scores(model: MultiplexedClassifier, pretrained: Pretrained) -> Tensor:
    with torch.no_grad():
        return model(dict(pretrained.tokenizer(TEXTS, padding=True, return_tensors="pt")))


@pytest.fixture
def saved(tiny_pretrained: Pretrained, tmp_path: Path) -> Path:
    model = adapter(tiny_pretrained)
    return save_adapter(
        model, describe_adapter(model, tiny_pretrained, 16, {"source": "toy.csv"}), tmp_path / "adapter"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS_NAME)
    weights = {name: value.clone() for name, value in weights.items()}
    change(weights)
    save_file(weights, folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("name", "num_inputs", "options"),
    [
        ("revmux", 2, {"own_state": "linear", "dropout": 0.1}),
        ("revmux", 4, {"exit_layer": 2}),
        ("token-split", 2, {}),
        ("mux-plm", 2, {}),
        ("datamux", 2, {}),
        ("datamux", 2, {"demultiplexer": "mlp"}),
        ("exit-head", 1, {"layer": 2}),
    ],
)
def test_saving_and_loading_an_adapter_keeps_the_scores(
    name: str, num_inputs: int, options: dict, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    model = adapter(tiny_pretrained, name, num_inputs, options)
    config = describe_adapter(model, tiny_pretrained, 16, {"source": "toy.csv"}, {"seed": 0}, {"accuracy_mean": 0.75})
    loaded = load_adapter(save_adapter(model, config, tmp_path / "adapter"), tiny_pretrained)
    assert_close(scores(loaded, tiny_pretrained), scores(model, tiny_pretrained))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_adapter_config(tmp_path / "adapter") == config
    assert loaded.method.options_dict() == model.method.options_dict()


def test_a_tuned_backbone_is_loaded_with_its_adapter_and_the_given_backbone_is_unchanged(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    own, other = (load_pretrained(BackboneConfig(model=str(tiny_model_folder), max_length=16)) for _ in range(2))
    own.backbone.freeze()
    other.backbone.freeze()
    model = adapter(own, options={"tune_backbone": True})
    with torch.no_grad():
        for parameter in own.backbone.parameters():
            parameter.add_(0.01)
    folder = save_adapter(model, describe_adapter(model, own, 16, {"source": "toy.csv"}), tmp_path / "tuned")
    plain = adapter(other, "siso", 1)
    before = scores(plain, other)
    loaded = load_adapter(folder, other)
    assert_close(scores(loaded, other), scores(model, own))
    assert torch.equal(scores(plain, other), before), "the backbone must be unchanged for other adapters"


RETRIEVAL = [
    ("datamux", {"tune_backbone": False}),
    ("datamux", {"tune_backbone": False, "demultiplexer": "mlp"}),
    ("mux-plm", {"tune_backbone": False}),
]


@pytest.mark.parametrize(("name", "options"), RETRIEVAL)
def test_weights_used_only_in_training_are_not_stored(
    name: str, options: dict, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    model = adapter(tiny_pretrained, name, options=options)
    decoder = model.method.state_dict()["retrieval_decoder.weight"]
    folder = save_adapter(
        model, describe_adapter(model, tiny_pretrained, 16, {"source": "toy.csv"}), tmp_path / "adapter"
    )
    stored = load_file(folder / WEIGHTS_NAME)
    assert not [name for name, value in stored.items() if "retrieval" in name or value.shape == decoder.shape]
    loaded = load_adapter(folder, tiny_pretrained)
    assert loaded.method.state_dict().keys() == {name.removeprefix("method.") for name in stored}, (
        "no weight is left at random"
    )
    assert "retrieval_decoder.weight" in model.method.state_dict(), "the model keeps it for training"
    edit_weights(folder, lambda weights: weights.update({"method.retrieval_decoder.weight": decoder}))
    with pytest.raises(UserError, match=r"unexpected method\.retrieval_decoder\.weight"):
        load_adapter(folder, tiny_pretrained)


def test_given_weights_are_saved_instead_of_those_of_the_model(tiny_pretrained: Pretrained, tmp_path: Path) -> None:
    model = adapter(tiny_pretrained)
    best = {name: torch.zeros_like(value) for name, value in artifact.adapter_weights(model).items()}
    save_adapter(model, describe_adapter(model, tiny_pretrained, 16, {"source": "t"}), tmp_path / "a", best)
    assert all(bool((value == 0).all()) for value in load_file(tmp_path / "a" / WEIGHTS_NAME).values())


def test_an_error_names_missing_weights(saved: Path, tiny_pretrained: Pretrained) -> None:
    edit_weights(saved, lambda weights: weights.pop("method.down.weight"))
    with pytest.raises(UserError, match=r"missing method\.down\.weight"):
        load_adapter(saved, tiny_pretrained)


def test_an_error_names_unexpected_weights(saved: Path, tiny_pretrained: Pretrained) -> None:
    edit_weights(saved, lambda weights: weights.update({"method.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"unexpected method\.extra"):
        load_adapter(saved, tiny_pretrained)


def test_an_error_names_weights_of_the_wrong_shape_and_both_shapes(saved: Path, tiny_pretrained: Pretrained) -> None:
    edit_weights(saved, lambda weights: weights.update({"method.down.bias": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"method\.down\.bias is \(1,\), not \(16,\)"):
        load_adapter(saved, tiny_pretrained)


def test_a_missing_or_truncated_weights_file_raises_a_user_error(saved: Path, tiny_pretrained: Pretrained) -> None:
    path = saved / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read"):
        load_adapter(saved, tiny_pretrained)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        load_adapter(saved, tiny_pretrained)


def test_a_newer_format_is_refused_with_both_versions(saved: Path) -> None:
    edit_config(saved, format_version=FORMAT_VERSION + 1, library_version="9.0")
    with pytest.raises(
        UserError,
        match=rf"format version {FORMAT_VERSION + 1} \(revmux 9\.0\), but revmux {revmux.__version__} supports",
    ):
        load_adapter_config(saved)


def test_a_format_with_raw_states_is_refused_where_states_are_now_normalized(
    saved: Path, tiny_pretrained: Pretrained
) -> None:
    edit_config(saved, format_version=2)
    load_adapter(saved, tiny_pretrained)  # BERT has no final norm
    llama = replace(tiny_pretrained, backbone=tiny_classifier("llama"))
    plain, corrected = (adapter(llama, options={"own_state": kind}) for kind in ("none", "linear"))
    for name, model in (("plain", plain), ("corrected", corrected)):
        save_adapter(model, describe_adapter(model, llama, 16, {"source": "toy.csv"}), saved.parent / name)
        load_adapter(saved.parent / name, llama)
        edit_config(saved.parent / name, format_version=2)
    load_adapter(saved.parent / "plain", llama)
    folder = saved.parent / "corrected"
    with pytest.raises(UserError, match=r"format version 2.*revmux read .* llama .*train the adapter again"):
        load_adapter(folder, llama)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not valid JSON"),
        ("[]", "not contain a JSON object"),
        ('{"format_version": 1, "rank": 8}', "unknown keys rank"),
        ('{"format_version": 1, "method": "revmux"}', "incomplete"),
        ("{}", "format version None"),
    ],
)
def test_a_damaged_config_is_refused(text: str, says: str, saved: Path) -> None:
    (saved / CONFIG_NAME).write_text(text)
    with pytest.raises(UserError, match=says):
        load_adapter_config(saved)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_inputs": "2"}, "num_inputs is '2': input should be a valid integer"),
        ({"label_names": ["bad", 1]}, r"label_names\.1 is 1: input should be a valid string"),
        ({"base_model": "tiny-bert"}, "base_model is 'tiny-bert': input should be a valid dict"),
    ],
)
def test_config_values_of_the_wrong_type_are_refused(changes: dict, says: str, saved: Path) -> None:
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=says):
        load_adapter_config(saved)


def test_options_of_the_wrong_type_are_refused(saved: Path, tiny_pretrained: Pretrained) -> None:
    edit_config(saved, options={"dropout": "x"})
    with pytest.raises(UserError, match="options of revmux: dropout is 'x': input should be a valid number"):
        load_adapter(saved, tiny_pretrained)


def test_loading_compares_shapes_without_copying_weights(
    saved: Path, tiny_pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "adapter_weights", fail)
    assert isinstance(load_adapter(saved, tiny_pretrained), MultiplexedClassifier)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "mistyped"):
        with pytest.raises(UserError, match="is not an adapter folder"):
            load_adapter_config(folder)


def test_an_adapter_of_another_backbone_is_refused(saved: Path, tmp_path: Path) -> None:
    other = load_pretrained(BackboneConfig(model=str(write_tiny_model(tmp_path / "other", seed=1)), max_length=16))
    with pytest.raises(UserError, match=r"trained on tiny-bert \(sha256 .* is other \(sha256"):
        load_adapter(saved, other)


def test_the_same_weights_under_another_name_are_the_same_backbone(
    saved: Path, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    moved = load_pretrained(BackboneConfig(model=str(write_tiny_model(tmp_path / "moved")), max_length=16))
    moved.backbone.freeze()
    loaded = load_adapter(saved, moved)
    expected = scores(load_adapter(saved, tiny_pretrained), tiny_pretrained)
    assert_close(scores(loaded, moved), expected)


@pytest.mark.parametrize("key", ["revision", "name"])
def test_a_backbone_of_the_hub_is_compared_by_revision_then_by_name(
    key: str, saved: Path, tiny_pretrained: Pretrained
) -> None:
    edit_config(saved, base_model={"name": "org/model", "revision": "a" * 40, "sha256": None})
    identity = {"name": "org/model", "revision": "a" * 40, "sha256": None}
    load_adapter(saved, replace(tiny_pretrained, identity=identity))
    edit_config(saved, base_model=identity | ({"revision": None} if key == "name" else {}))
    other = identity | {key: "org/other" if key == "name" else "b" * 40}
    with pytest.raises(UserError, match="was trained on org/model"):
        load_adapter(saved, replace(tiny_pretrained, identity=other))


def test_an_adapter_with_other_labels_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny-bert")
    edited = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "good", "1": "bad"}}
    (folder / "config.json").write_text(json.dumps(edited))
    swapped = load_pretrained(BackboneConfig(model=str(folder), max_length=16))
    with pytest.raises(UserError, match="has the labels bad, good, but the backbone has good, bad"):
        load_adapter(saved, swapped)


def fail(*_: object, **__: object) -> str:
    raise OSError("no space left")


def test_an_interrupted_write_leaves_no_folder(
    tiny_pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapter(tiny_pretrained)
    monkeypatch.setattr(artifact, "model_card", fail)  # the last file of the folder
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, describe_adapter(model, tiny_pretrained, 16, {"source": "t"}), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("breaks_at", ["a file", "the exchange"])
def test_an_interrupted_rewrite_leaves_the_old_adapter(
    breaks_at: str, saved: Path, tiny_pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = adapter(tiny_pretrained, "token-split")
    if breaks_at == "a file":
        monkeypatch.setattr(artifact, "model_card", fail)
    else:
        monkeypatch.setattr(files, "_exchange", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, describe_adapter(model, tiny_pretrained, 16, {"source": "t"}), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_adapter_is_recovered_after_its_replacement_was_killed(saved: Path, tiny_pretrained: Pretrained) -> None:
    files._move_aside(saved)  # as on a file system without exchange, with the process killed afterwards
    assert not saved.exists()
    assert load_adapter_config(saved).method == "revmux"
    load_adapter(saved, tiny_pretrained)
    assert list(saved.parent.iterdir()) == [saved]


def test_a_rewrite_replaces_the_whole_folder(saved: Path, tiny_pretrained: Pretrained) -> None:
    (saved / "left-over").touch()
    model = adapter(tiny_pretrained, "token-split")
    save_adapter(model, describe_adapter(model, tiny_pretrained, 16, {"source": "t"}), saved)
    assert load_adapter_config(saved).method == "token-split"
    assert sorted(path.name for path in saved.iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME, "README.md"])
    assert list(saved.parent.iterdir()) == [saved]


def test_the_card_contains_the_measured_figures_and_no_local_path(
    tiny_pretrained: Pretrained, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_csv.parent))
    task = load_task(DataConfig(source=f"~/{tiny_csv.name}"))
    model = adapter(tiny_pretrained)
    training = {"seed": 0, "optim": vars(OptimConfig()), "loss": vars(LossConfig())}
    config = describe_adapter(model, tiny_pretrained, 16, task.identity, training, {"accuracy_mean": 0.87654})
    folder = save_adapter(model, config, tmp_path / "adapter")
    card = (folder / "README.md").read_text()
    assert "accuracy_mean: 0.8765" in card
    assert f"{sum(value.numel() for value in model.method.parameters()):,} trained weights" in card
    for expected in ("tiny-bert", "bad, good", "tiny.csv", "N = 2, l = 1", str(tiny_pretrained.identity["sha256"])):
        assert expected in card
    for text in (card, (folder / CONFIG_NAME).read_text()):
        for path in (tiny_csv.parent, tmp_path, Path.cwd(), "~/"):
            assert str(path) not in text
    assert card.startswith("---\nlibrary_name: revmux\n")


def test_a_card_without_figures_says_that_nothing_was_measured(tiny_pretrained: Pretrained, saved: Path) -> None:
    assert "Not evaluated." in (saved / "README.md").read_text()


def test_the_config_is_plain_sorted_json(saved: Path, tiny_pretrained: Pretrained) -> None:
    text = (saved / CONFIG_NAME).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    config = load_adapter_config(saved)
    assert isinstance(config, AdapterConfig)
    assert asdict(config)["base_model"] == tiny_pretrained.identity
    assert config.library_version == revmux.__version__
