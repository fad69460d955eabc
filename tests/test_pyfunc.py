"""Registered adapters: MLflow loads them anywhere and they answer as in training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from numeric import assert_close
from tiny_models import LABELS
from torch import Tensor

from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.pyfunc import MODEL_NAME, save_pyfunc
from ray_jobs.tracking.tracker import Tracker
from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.adapters.classifier import TextClassifier
from revmux.adapters.folder import describe_adapter, load_adapter, save_adapter
from revmux.pretrained.pretrained import Pretrained
from serve_app.sources import fetch_adapter

pytestmark = pytest.mark.numeric

TEXTS = ["w1 w5 w6", "w2 w9 w4", "w7 w3 w2", "w30 w1 w2", "w11 w12 w8"]  # of equal length, so they are grouped in order


@dataclass
class Registered:
    """A registered adapter of a run; its original files are deleted."""

    uri: str
    run_id: str
    expected: Tensor
    artifacts: Path


@pytest.fixture(scope="module")
def adapter(tiny_pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    method = build_method("revmux", BackboneShape.of(tiny_pretrained.backbone), 2)
    model = MultiplexedClassifier(tiny_pretrained.backbone, method, 1)
    folder = tmp_path_factory.mktemp("made") / "adapter"
    return save_adapter(model, describe_adapter(model, tiny_pretrained, 16, {"source": "toy.csv"}), folder)


@pytest.fixture(scope="module")
def registered(
    adapter: Path, tiny_pretrained: Pretrained, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Registered:
    tokens = dict(tiny_pretrained.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = load_adapter(adapter, tiny_pretrained)(tokens)
    storage = tmp_path_factory.mktemp("storage")
    # Two folders with the same name.
    made = [
        shutil.copytree(source, storage / kind / "new")
        for kind, source in (("adapters", adapter), ("models", tiny_model_folder))
    ]
    tracker = Tracker(TrackingConfig(), storage)
    with tracker.run("revmux-n2-l1", {}) as run_id:
        tracker.log_folder(run_id, made[0], "adapter")
    number = tracker.register(run_id, made[0], "toy", {"num_inputs": 2}, str(made[1]))
    tracker.client.set_registered_model_alias("toy", "champion", number)
    for folder in made:
        shutil.rmtree(folder)
    source = tracker.client.get_model_version("toy", number).source
    return Registered(tracker.uri, run_id, expected, Path(source.removeprefix("file://")))


@pytest.fixture
def tracked(registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registered:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(registered.uri)
    yield registered
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # any other value would win over the environment variable


def close(found: pd.DataFrame, expected: Tensor) -> None:
    assert list(found.columns) == LABELS
    assert_close(torch.tensor(found.to_numpy()).float(), expected)


def test_lists_and_frames_are_answered_as_in_training(tracked: Registered) -> None:
    model = mlflow.pyfunc.load_model("models:/toy@champion")
    close(model.predict(TEXTS), tracked.expected)
    frame = pd.DataFrame({"text": TEXTS}, index=list("abcde"))
    found = model.predict(frame)
    close(found, tracked.expected)
    assert list(found.index) == list("abcde")
    close(mlflow.pyfunc.load_model(f"runs:/{tracked.run_id}/{MODEL_NAME}").predict(TEXTS), tracked.expected)


OTHER_MACHINE = """
import json, sys
sys.modules["ray_jobs"] = sys.modules["ray"] = None  # as if only the required packages were installed
import torch
torch.set_num_threads(2)
import mlflow
model = mlflow.pyfunc.load_model("models:/toy@champion")
print(json.dumps(model.predict(json.loads(sys.argv[1])).to_numpy().tolist()))
"""


def test_another_process_loads_the_model_from_the_registry_alone(registered: Registered, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MACHINE, json.dumps(TEXTS)],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": registered.uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert_close(found, registered.expected)


def test_a_model_has_a_signature_and_pinned_requirements_and_no_pickle(tracked: Registered) -> None:
    info = mlflow.models.get_model_info("models:/toy@champion")
    assert info.signature.inputs.to_dict() == [{"type": "string", "required": True}]
    assert info.signature.outputs.input_names() == LABELS
    example = mlflow.pyfunc.load_model("models:/toy@champion").input_example
    assert list(example.columns) == ["text"]
    required = (tracked.artifacts / "requirements.txt").read_text().split()
    assert f"torch=={version('torch').partition('+')[0]}" in required
    assert f"revmux=={version('revmux')}" in required
    assert all("==" in line for line in required)
    kinds = {path.suffix for path in tracked.artifacts.rglob("*") if path.is_file()}
    assert kinds == {"", ".json", ".md", ".py", ".safetensors", ".txt", ".yaml"}


def test_the_server_loads_a_registered_model(tracked: Registered, adapter: Path, tmp_path: Path) -> None:
    for uri in ("models:/toy@champion", "models:/toy/1", f"runs:/{tracked.run_id}/adapter"):
        folder = fetch_adapter(uri, tmp_path)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in adapter.iterdir()
        }


def test_loading_names_a_backbone_that_cannot_be_found(
    adapter: Path, tiny_model_folder: Path, registered: Registered, tmp_path: Path
) -> None:
    folder = save_pyfunc(adapter, tmp_path / "alone")
    assert not (folder / "artifacts/backbone").exists()
    with pytest.raises(
        UserError, match=r"trained on the local model 'tiny-bert'.*model_config=\{\"backbone\": FOLDER\}"
    ):
        mlflow.pyfunc.load_model(str(folder))
    model = mlflow.pyfunc.load_model(str(folder), model_config={"backbone": str(tiny_model_folder)})
    close(model.predict(TEXTS), registered.expected)


def test_pairs_are_two_columns_in_any_order(
    adapter: Path, tiny_model_folder: Path, tiny_pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = save_pyfunc(adapter, tmp_path / "pairs", str(tiny_model_folder), pairs=True)
    model = mlflow.pyfunc.load_model(str(folder))
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7"), ("w8", "w9")]
    expected = TextClassifier.from_pretrained(adapter, tiny_pretrained).scores(pairs)
    frame = pd.DataFrame(pairs, columns=["text", "text_pair"])
    for given in (frame, frame[["text_pair", "text"]], pairs):
        close(model.predict(given), expected)
    with pytest.raises(MlflowException, match="missing inputs"):
        model.predict(frame[["text"]])


def test_other_columns_and_texts_are_refused(tracked: Registered) -> None:
    model = mlflow.pyfunc.load_model("models:/toy@champion")
    with pytest.raises(UserError, match=r"has the columns 'id'; pass only text, such as frame\[\['text'\]\]"):
        model.predict(pd.DataFrame({"id": ["7"], "text": ["w1"]}))
    with pytest.raises(UserError, match="empty text"):
        model.predict(["w1", ""])
