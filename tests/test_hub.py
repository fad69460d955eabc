"""Adapters on the hub: pushed in one commit, loaded by id and revision, with the backbone on which they were trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants
from numeric import assert_close
from peft_adapters import write_peft
from tiny_models import write_tiny_model

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.adapters.classifier import TextClassifier
from revmux.adapters.config import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, load_adapter_config
from revmux.adapters.folder import describe_adapter, load_adapter, save_adapter
from revmux.adapters.push import push_to_hub
from revmux.data.prompt import load_prompt
from revmux.pretrained import hub as library
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.identity import identity_of, weights_sha256
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.task_model import PROMPT_NAME, read_prompt
from revmux.serving.adapters import load_adapters

TEXTS = ["w1 w5 w6", "w2 w9", "w7", "w30 w1 w2 w3", "w11 w12"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for this process, with an empty cache."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it caches the hub's address
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def build(pretrained: Pretrained, seed: int = 3) -> MultiplexedClassifier:
    torch.manual_seed(seed)
    method = build_method("revmux", BackboneShape.of(pretrained.backbone), 2)
    return MultiplexedClassifier(pretrained.backbone, method, 1).eval()


def save(pretrained: Pretrained, folder: Path, seed: int = 3) -> Path:
    model = build(pretrained, seed)
    return save_adapter(model, describe_adapter(model, pretrained, 16, {"source": "toy.csv"}), folder)


def scores(adapter: str | Path, **arguments: object) -> torch.Tensor:
    return TextClassifier.from_pretrained(adapter, **arguments).scores(TEXTS)  # type: ignore[arg-type]


def load_from_hub(name: str) -> Pretrained:
    pretrained = load_pretrained(BackboneConfig(model=name, max_length=16))
    pretrained.backbone.freeze()
    return pretrained


def test_an_adapter_loaded_from_the_hub_equals_the_pushed_one(
    hub: Hub, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = save(tiny_pretrained, tmp_path / "adapter")
    assert hub.requests == [], "saving sends no request to the hub"
    commit = push_to_hub(folder, "me/adapter", private=True)
    pushed = hub.repositories["me/adapter"]
    assert pushed.private
    assert pushed.branches == {"main": commit}
    assert pushed.commits[commit] == {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = load_adapter("me/adapter", tiny_pretrained)
    state = build(tiny_pretrained).method.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.method.state_dict().items())
    (served,) = load_adapters([f"me/adapter@{commit}"], tiny_pretrained)
    assert (served.folder, served.route.width) == (f"me/adapter@{commit}", 2)


def test_a_revision_can_be_a_branch_or_a_commit(hub: Hub, tiny_pretrained: Pretrained, tmp_path: Path) -> None:
    first = push_to_hub(save(tiny_pretrained, tmp_path / "a"), "me/adapter")
    model = build(tiny_pretrained, seed=4)
    config = describe_adapter(model, tiny_pretrained, 12, {"source": "toy.csv"})
    second = push_to_hub(model, "me/adapter", config, revision="longer")
    assert hub.repositories["me/adapter"].branches == {"main": first, "longer": second}
    lengths = {
        revision: load_adapter_config("me/adapter", revision).max_length for revision in (None, first, "longer", second)
    }
    assert lengths == {None: 16, first: 16, "longer": 12, second: 12}
    assert load_adapter_config("me/adapter@longer").max_length == 12
    down = [
        load_adapter("me/adapter", tiny_pretrained, revision).method.get_parameter("down.weight")
        for revision in (first, second)
    ]
    assert not torch.equal(*down)


def test_an_adapter_loads_its_backbone_at_the_revision_of_training(
    hub: Hub, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/tiny", tiny_model_folder)
    pretrained = load_from_hub("org/tiny")
    assert pretrained.identity == {
        "name": "org/tiny",
        "revision": commit,
        "sha256": weights_sha256(tiny_model_folder),
    }
    folder = save(pretrained, tmp_path / "adapter")
    assert load_adapter_config(folder).base_model == pretrained.identity
    assert "base_model: org/tiny\n" in (folder / CARD_NAME).read_text()
    expected = scores(folder, backbone=pretrained)
    push_to_hub(folder, "me/adapter")
    moved = hub.add("org/tiny", write_tiny_model(tmp_path / "moved", seed=1))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    assert_close(scores("me/adapter"), expected)
    with pytest.raises(UserError, match=r"trained on org/tiny \(sha256 .* is org/tiny \(sha256"):
        scores("me/adapter", backbone="org/tiny")
    assert_close(scores("me/adapter", backbone=tiny_model_folder), expected)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert_close(scores("me/adapter"), expected)
    assert hub.requests == []
    assert moved != commit


def test_a_local_backbone_is_recorded_under_its_id_on_the_hub(
    hub: Hub, tiny_pretrained: Pretrained, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = save(tiny_pretrained, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"trained on the local model 'tiny-bert' \(sha256 .*backbone=FOLDER"):
        scores(folder)
    hub.add("me/other", write_tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match=r"trained on tiny-bert .* me/other on the hub has sha256"):
        push_to_hub(folder, "me/adapter", base_model="me/other")
    assert "me/adapter" not in hub.repositories
    commit = hub.add("me/tiny", tiny_model_folder)
    push_to_hub(folder, "me/adapter", base_model="me/tiny")
    identity = {"name": "me/tiny", "revision": commit, "sha256": tiny_pretrained.identity["sha256"]}
    assert load_adapter_config("me/adapter").base_model == identity
    assert load_adapter_config(folder).base_model == tiny_pretrained.identity, "the folder must be unchanged"
    assert_close(scores("me/adapter"), scores(folder, backbone=tiny_pretrained))


def test_the_identity_of_a_model_is_the_same_before_and_after_the_download(hub: Hub, tiny_model_folder: Path) -> None:
    commit = hub.add("org/tiny", tiny_model_folder)
    before = identity_of(BackboneConfig("org/tiny"))
    assert before == {"name": "org/tiny", "revision": commit, "sha256": weights_sha256(tiny_model_folder)}
    assert not [asked for asked in hub.requests if "resolve" in asked and asked.endswith(".safetensors")]
    assert load_from_hub("org/tiny").identity == before
    hub.requests.clear()
    assert identity_of(BackboneConfig("org/tiny")) == before


@pytest.mark.parametrize("written", [PROMPT_NAME, None])
def test_a_prompt_that_cannot_be_read_offline_is_not_treated_as_missing(
    written: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    prompt = load_prompt("sst2")
    if written:
        (folder / written).write_text(json.dumps(prompt.to_dict()))
    hub.add("org/model", folder)
    library.fetch("org/model", None, ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"cannot determine whether 'org/model' has a {PROMPT_NAME}"):
        read_prompt("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = read_prompt("org/model")
    assert online == (prompt if written else None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_prompt("org/model") == online, "cached by now, including that there is none"


def test_the_hash_of_several_files_is_the_same_here_and_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / f"{name}.safetensors").write_bytes(name.encode())
    commit = hub.add("org/shards", tmp_path / "shards")
    assert library.weights_on_hub("org/shards") == (commit, weights_sha256(tmp_path / "shards"))


def test_an_error_names_what_cannot_be_loaded(
    hub: Hub, tiny_pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(save(tiny_pretrained, tmp_path / "adapter"), "me/adapter", private=True)
    with pytest.raises(UserError, match=r"cannot find adapter folder 'me/mistyped'.*cannot get 'me/mistyped'.*404"):
        load_adapter_config("me/mistyped")
    with pytest.raises(UserError, match="'me/adapter' at revision 'v9'"):
        load_adapter_config("me/adapter", revision="v9")
    hub.add("me/no-adapter", write_tiny_model(tmp_path / "model"))
    with pytest.raises(UserError, match=f"'me/no-adapter' is not an adapter folder: it has no {CONFIG_NAME}"):
        load_adapter_config("me/no-adapter")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(UserError, match=r"cannot get 'me/adapter'.*HF_TOKEN if it is private"):
        load_adapter_config("me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot get 'me/elsewhere'"):
        load_adapter_config("me/elsewhere")


def test_an_error_names_what_cannot_be_pushed(
    hub: Hub, tiny_pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_pretrained, tmp_path / "adapter")
    with pytest.raises(UserError, match="repository is 'adapter'; choose USER/NAME"):
        push_to_hub(folder, "adapter")
    with pytest.raises(UserError, match=r"pass config=describe_adapter\(\.\.\.\)"):
        push_to_hub(build(tiny_pretrained), "me/adapter")
    with pytest.raises(UserError, match="is not an adapter folder"):
        push_to_hub(tmp_path, "me/adapter")
    (folder / WEIGHTS_NAME).rename(tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match=f"has no {WEIGHTS_NAME}; the folder is damaged"):
        push_to_hub(folder, "me/adapter")
    (tmp_path / WEIGHTS_NAME).rename(folder / WEIGHTS_NAME)
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(UserError, match=r"401.*log in with hf auth login, or set HF_TOKEN"):
        push_to_hub(folder, "me/adapter")
    assert hub.repositories == {}


OTHER_MACHINE = """
import json, sys, torch
torch.set_num_threads(2)
from revmux import TextClassifier
classifier = TextClassifier.from_pretrained(sys.argv[1])
print(json.dumps(classifier.scores(json.loads(sys.argv[2])).tolist()))
"""


def test_an_adapter_pushed_on_one_machine_gives_the_same_scores_on_another(
    hub: Hub, tiny_pretrained: Pretrained, tiny_model_folder: Path, tmp_path: Path
) -> None:
    hub.add("me/tiny", tiny_model_folder)
    folder = save(tiny_pretrained, tmp_path / "adapter")

    def python(machine: str, *arguments: str) -> str:
        home = tmp_path / machine
        home.mkdir()
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=home,
            env=environment | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    reported = python("one", "-m", "revmux", "push", str(folder), "me/adapter", "--base_model", "me/tiny")
    assert reported == f"pushed: me/adapter at {hub.repositories['me/adapter'].branches['main']}"
    found = torch.tensor(json.loads(python("another", "-c", OTHER_MACHINE, "me/adapter", json.dumps(TEXTS))))
    assert_close(found, scores(folder, backbone=tiny_pretrained))


def test_a_peft_adapter_on_the_hub_is_a_task_model(hub: Hub, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    commit = hub.add("org/base", base)
    folder, expected = write_peft(tmp_path / "adapter", base, base_model_name_or_path="org/base", revision=commit)
    commit = hub.add("me/mood", folder)
    pretrained = load_from_hub("me/mood")
    assert (pretrained.identity["name"], pretrained.identity["revision"]) == ("me/mood", commit)
    assert pretrained.identity["sha256"] == load_from_hub(str(folder)).identity["sha256"]
    pretrained.backbone.freeze()
    with torch.no_grad():
        assert_close(pretrained.backbone(pretrained.encode(TEXTS)), expected(TEXTS))
