"""PEFT adapters with a classification head as task models: merged into their base, whose other weights are shared."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PromptTuningConfig, get_peft_model
from peft_adapters import TARGETS, edit_settings, write_peft
from safetensors.torch import load_file
from serving_models import load, text, write_adapter, write_model
from tiny_models import LABELS, tiny_config, write_language_model, write_tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from revmux import UserError
from revmux.backbone import HiddenState
from revmux.backbone.joint_layers import JointLayers
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.estimate.peak import StorageCounter
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.identity import identity_of, weights_sha256
from revmux.pretrained.loading import inspect, load_pretrained
from revmux.pretrained.location import check_model
from revmux.pretrained.peft_adapter import read_peft_adapter
from revmux.pretrained.shared_base import SharedBases
from revmux.pretrained.task_model import save_task_model
from revmux.serving import Engine
from revmux.serving.lower_layers import LowerLayers
from revmux.serving.shared_weights import WeightPool
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import prepare, train_here
from revmux.utils import extras

pytestmark = pytest.mark.numeric

TEXTS = ["w1 w5 w6", "w2 w9", "w30 w1 w2 w3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "bert": write_tiny_model(root / "bert"),
        "llama": write_language_model(root / "llama", "llama"),  # without a head
    }


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("is_merged", [True, False])
def test_the_plain_model_answers_as_peft_does(
    family: str, is_merged: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder, expected = write_peft(tmp_path / "adapter", bases[family])
    config = BackboneConfig(str(folder), max_length=32)
    check_model(config)
    pretrained = load_pretrained(config, bases=None if is_merged else SharedBases())
    assert (pretrained.base is None) == is_merged
    pretrained.backbone.freeze()
    assert pretrained.backbone.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with torch.no_grad():
        found = pretrained.backbone(pretrained.encode(TEXTS))
    torch.testing.assert_close(found, expected(TEXTS), atol=1e-5, rtol=1e-5)
    shape, names = inspect(config)
    assert (shape.num_layers, names) == (3, pretrained.backbone.label_names)
    assert identity_of(config) == pretrained.identity
    other, _ = write_peft(tmp_path / "other", bases[family], seed=1)
    assert len({identity_of(BackboneConfig(str(model)))["sha256"] for model in (folder, other)}) == 2


def test_names_of_classes_and_the_tokenizer_may_lie_beside_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    folder, expected = write_peft(tmp_path / "adapter", bases["bert"])
    model_config = json.loads((bases["bert"] / "config.json").read_text())
    names = ["no", "maybe", "yes"]
    model_config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(model_config))
    AutoTokenizer.from_pretrained(bases["bert"]).save_pretrained(folder)
    pretrained = load_pretrained(BackboneConfig(str(folder), max_length=32))
    assert pretrained.backbone.label_names == names
    pretrained.backbone.freeze()
    with torch.no_grad():
        assert_close(pretrained.backbone(pretrained.encode(TEXTS)), expected(TEXTS))


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, dict[str, Callable[[list[str]], Tensor]]]]:
    """An engine with two adapters above layer 2 of one base; the first has a multiplexing adapter of its own."""
    root = tmp_path_factory.mktemp("served")
    (root / "base").mkdir()
    base = write_model(root / "base")
    made = {name: write_peft(root / name, base, seed, layers=[2, 3]) for seed, name in enumerate(("mood", "topic"))}
    with Engine() as engine:
        for name, (folder, _) in made.items():
            pretrained = load(folder)
            adapters = [write_adapter(root / "multiplexing", pretrained, 2)] if name == "mood" else []
            engine.add_task(name, pretrained, adapters)
        yield engine, {name: scores for name, (_, scores) in made.items()}


def test_adapters_on_one_base_share_all_weights_that_they_do_not_change(served: Any) -> None:
    engine, _ = served
    one, other = (task.backbone for task in engine.tasks.values())
    places = {name: tensor.data_ptr() for name, tensor in one.named_parameters()}
    own = {name for name, tensor in other.named_parameters() if tensor.data_ptr() != places[name]}
    assert own == {
        f"model.bert.encoder.layer.{layer}.attention.self.{part}.weight" for layer in (2, 3) for part in TARGETS["bert"]
    }
    assert engine.task("mood").layers_in_common(engine.task("topic")) == 2


def test_one_request_asks_several_adapters(served: Any) -> None:
    engine, expected = served
    texts = [text(4)]
    found = asyncio.run(engine.answer_tasks(texts, list(expected), max_multiplex=1))
    for (name, scores), answers in zip(expected.items(), found):
        torch.testing.assert_close(answers[0].scores, scores(texts)[0], atol=1e-5, rtol=1e-5)
        assert len(engine.task(name).label_names) == 3
    assert engine.stats()["shared_prefill"] == 1
    futures = engine.submit([text(4)] * 12, task="mood")
    assert {future.result(60).width for future in futures} == {2}


def test_adapters_on_a_shared_base_add_only_their_own_weights(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        write_peft(tmp_path / f"{seed}", bases["bert"], seed, classes=seed + 2, layers=[2])[0] for seed in (0, 1)
    ]
    copied = shutil.copytree(bases["bert"], tmp_path / "copy")  # the same content in another folder
    edit_settings(folders[1], base_model_name_or_path=str(copied))
    shared = SharedBases()
    one, other = (load_pretrained(BackboneConfig(str(folder), max_length=32), bases=shared) for folder in folders)
    assert one.base is other.base is not None
    assert one.tokenizer is other.tokenizer
    counter = StorageCounter()
    counter.add(chain(one.base.model.parameters(), one.base.model.buffers()))
    for pretrained, folder in ((one, folders[0]), (other, folders[1])):
        saved = load_file(folder / "adapter_model.safetensors")
        own = counter.add(chain(pretrained.backbone.parameters(), pretrained.backbone.buffers()))
        assert own == sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
        assert pretrained.backbone.layer(1) is one.base.model.bert.encoder.layer[1]
    with torch.no_grad():
        before = [pretrained.backbone(pretrained.encode(TEXTS)) for pretrained in (one, other)]
    assert [scores.shape[1] for scores in before] == [2, 3]
    found = weakref.ref(one.base)
    del one, other, pretrained
    gc.collect()
    assert found() is None  # nothing uses it any more


def test_inputs_of_several_adapters_on_one_base_run_in_one_batch(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, batches = JointLayers.run, []

    def run(layers: JointLayers, state: HiddenState, updates: Any) -> HiddenState:
        batches.append((state.depth, len(state.hidden)))
        return original(layers, state, updates)

    monkeypatch.setattr(JointLayers, "run", run)
    changed = {"all": [0, 1, 2], "upper": [1, 2], "last": [2]}
    shared, engine = SharedBases(), Engine()
    expected: dict[str, Callable[[list[str]], Tensor]] = {}
    for seed, (name, layers) in enumerate(changed.items()):
        folder, expected[name] = write_peft(tmp_path / name, bases["bert"], seed, classes=seed + 2, layers=layers)
        engine.add_task(name, load_pretrained(BackboneConfig(str(folder), max_length=32), bases=shared))
    texts = {name: [f"w{index} w{start + index}" for index in range(3)] for start, name in enumerate(changed, 3)}
    futures = {name: engine.submit(own, task=name) for name, own in texts.items()}
    engine.start()
    for name, own in texts.items():
        found = torch.stack([future.result(60).scores for future in futures[name]])
        torch.testing.assert_close(found, expected[name](own), atol=1e-5, rtol=1e-5)
    assert batches == [(0, 9)]
    found = asyncio.run(engine.answer_tasks(["w1 w2"], ["upper", "last"]))
    for name, [answer] in zip(("upper", "last"), found):
        torch.testing.assert_close(answer.scores, expected[name](["w1 w2"])[0], atol=1e-5, rtol=1e-5)
    assert batches[1:] == [(1, 2)]  # above the layer that both have
    assert engine.stats()["shared_prefill"] == 1
    engine.close()


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"a_setting_of_the_future": 1}]
)
def test_an_adapter_that_is_more_than_lora_is_merged(
    settings: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder, _ = write_peft(tmp_path / "adapter", bases["bert"])
    edit_settings(folder, **settings)
    adapter = read_peft_adapter(str(folder))
    assert adapter is not None
    assert not adapter.is_plain_lora


def test_multiplexing_adapters_run_on_an_unmerged_model(bases: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = write_peft(tmp_path / "adapter", bases["bert"])
    merged = load_pretrained(BackboneConfig(str(folder), max_length=32))
    apart = load_pretrained(BackboneConfig(str(folder), max_length=32), bases=SharedBases())
    torch.manual_seed(0)
    method = build_method("token-split", BackboneShape.of(merged.backbone), 2, {"lora_rank": 2})
    models = [MultiplexedClassifier(pretrained.backbone.freeze(), method, 1).eval() for pretrained in (merged, apart)]
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected, found = (model(merged.encode(TEXTS[:2])) for model in models)
        assert_close(found, expected)
        models[1].merge_lora(2**30)
        assert_close(models[1](merged.encode(TEXTS[:2])), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM'; name one with a classification head"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
        ({"base_model_name_or_path": "/nowhere/base"}, "cannot find folder '/nowhere/base'"),
        ({"peft_type": "UNKNOWN"}, "PEFT cannot merge adapter .* of type UNKNOWN"),
    ],
)
def test_an_adapter_that_cannot_be_a_task_is_refused(
    settings: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder, _ = write_peft(tmp_path / "adapter", bases["bert"], **settings)
    with pytest.raises(UserError, match=message):
        load_pretrained(BackboneConfig(str(folder)))
    if "peft_type" not in settings:
        with pytest.raises(UserError, match=message):
            check_model(BackboneConfig(str(folder)))


def test_prompt_tuning_is_refused_because_it_cannot_be_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"])
    get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"of type PROMPT_TUNING .* only adapters that change weights"):
        load_pretrained(BackboneConfig(str(tmp_path)))


def test_an_adapter_without_a_head_needs_a_base_with_one(bases: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=2, pad_token_id=0)
    config = LoraConfig(r=2, target_modules=["q_proj"])  # without a task type, PEFT saves no head
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match=r"contains no classification head, and neither does .*llama"):
        load_pretrained(BackboneConfig(str(tmp_path)))


def test_a_missing_package_is_named(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_peft(tmp_path / "adapter", bases["bert"])
    monkeypatch.setitem(extras.EXTRAS, "peft", ("no_such_module",))
    with pytest.raises(UserError, match=r"pip install 'revmux\[peft\]'"):
        check_model(BackboneConfig(str(folder)))


def write_family(folder: Path, family: str, tokenizer: Path) -> Path:
    """A random classifier of two classes with the tokenizer of another model."""
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = tiny_config(family, initializer_range=0.2, pad_token_id=0, id2label=names)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_tuning_by_lora_writes_a_peft_adapter_above_the_frozen_layers(
    family: str, bases: dict[str, Path], tiny_csv: Path, tmp_path: Path
) -> None:
    base = write_family(tmp_path / "base", family, bases["bert"])

    def config(folder: Path) -> BackboneConfig:
        return BackboneConfig(str(folder), max_length=16, attention="eager" if family == "deberta-v2" else "sdpa")

    data = DataConfig(source=str(tiny_csv))
    method = MethodConfig("siso", 1, 2, {"peft_rank": 2})
    optim = OptimConfig(epochs=1, batch_size=8, learning_rate=0.01)
    loss = LossConfig(infonce_weight=0.0)
    recipe = Recipe(config(base), data, method, optim, loss, shuffles=1)
    before = weights_sha256(base)
    prepared = prepare(recipe, load_task(data))
    trained = train_here(prepared)
    folder = save_task_model(prepared.pretrained, tmp_path / "adapter", pairs=False)
    assert weights_sha256(base) == before
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["task_type"]) == (str(base), "SEQ_CLS")
    tuned = load_pretrained(config(folder))
    tuned.backbone.freeze()
    assert tuned.backbone.label_names == prepared.pretrained.backbone.label_names
    assert tuned.pairs is False
    with torch.no_grad():
        prepared.pretrained.backbone.eval()
        own = prepared.pretrained.backbone(prepared.pretrained.encode(TEXTS))
        assert_close(tuned.backbone(tuned.encode(TEXTS)), own)
        tokens = tuned.encode(TEXTS)
        tokens.pop("token_type_ids")
        expected = AutoPeftModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, pad_token_id=tuned.tokenizer.pad_token_id
        ).eval()
        assert_close(tuned.backbone(tuned.encode(TEXTS)), expected(**tokens).logits)
    plain = load_pretrained(config(base)).backbone.freeze()
    pool = WeightPool()
    pool.share(plain)
    pool.share(tuned.backbone)
    lower = [LowerLayers(backbone, tuned.encode(TEXTS[:1])) for backbone in (plain, tuned.backbone)]
    assert lower[0].in_common(lower[1]) == 2
    assert trained.accuracy_mean >= 0
