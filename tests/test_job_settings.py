"""Settings that a job refuses before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft_adapters import write_peft
from tiny_models import write_tiny_model

from ray_jobs import cli, evaluate, finetune, train, tune
from ray_jobs.cluster import ClusterConfig, warn_about_head
from ray_jobs.paths import store_in
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.run import base_recipe
from ray_jobs.training.config import EvaluateJob, FeaturesJob, FinetuneJob, TrainJob
from ray_jobs.training.launch import fingerprint, number_of_workers
from ray_jobs.training.resource_wait import format_resources
from ray_jobs.training.store_features import storage_of
from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import inspect
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import check, prepare


def printed_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a refused job printed."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method.prefill_layers", "9"], ["9", "0..3"]),
        (["--num_inputs", "[3]", "--optim.batch_size", "6"], ["32", "3"]),
        (["--method.name", "revmax"], ["revmax", "token-split"]),
        (["--method.name", "siso"], ["siso", "revmux finetune"]),
        (["--method.options", "{own_stat: mlp}"], ["own_stat", "own_state"]),
        (
            ["--method.name", "datamux", "--method.options", "{demultiplexer: index}", "--backbone.max_length", "38"],
            ["max_length is 38", "datamux adds 3 tokens", "at most 40", "max_length 37"],
        ),
        (["--optim.batch_size", "9"], ["batch_size (9)", "choose 8"]),
        (["--optim.batch_size", "2"], ["2 × 2 = 4", "every worker needs a group"]),
        (["--data.limit", "1"], ["the train split has 1 rows", "N = 2", "choose a smaller N"]),
        (["--data.source", "nowhere.csv"], ["nowhere.csv"]),
    ],
)
def test_a_user_error_is_one_line_and_exit_status_2(
    flags: list[str],
    words: list[str],
    tiny_model_folder: Path,
    tiny_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--backbone.model", str(tiny_model_folder), "--backbone.max_length", "16", "--storage", str(tmp_path)]
    argv += ["--method.prefill_layers", "1", "--data.source", str(tiny_csv), *flags]
    assert cli.run(train.main, TrainJob, None, argv) == 2
    line = printed_error(capsys)
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())


def test_gpus_are_refused_on_a_machine_without_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    argv = ["--cluster.gpus_per_worker", "1"]
    assert cli.run(lambda job: job.cluster.check_here(), FinetuneJob, None, argv) == 2
    assert "no GPU" in printed_error(capsys)


@pytest.mark.parametrize("job", [train, finetune, tune])
def test_workers_that_would_share_a_gpu_are_refused(
    job: ModuleType, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--backbone.model", str(tiny_model_folder), "--storage", str(tmp_path), "--cluster.workers", "2"]
    config = {train: TrainJob, finetune: FinetuneJob, tune: TuneJob}[job]
    assert cli.run(job.main, config, None, [*argv, "--cluster.gpus_per_worker", "0.5"]) == 2
    assert "gpus_per_worker is 0.5 with 2 workers" in printed_error(capsys)


def test_a_driver_on_the_head_of_a_cluster_is_warned() -> None:
    head = {"NodeID": "a", "Alive": True, "Resources": {"node:__internal_head__": 1.0, "CPU": 2.0}}
    other = {"NodeID": "b", "Alive": True, "Resources": {"CPU": 2.0}}
    assert warn_about_head([head], "a") is None  # a single machine
    assert warn_about_head([head, other], "b") is None
    assert warn_about_head([head, other | {"Alive": False}], "a") is None
    busy = warn_about_head([head, other], "a")
    assert busy is not None
    assert "--entrypoint-resources" in busy
    assert warn_about_head([head | {"Resources": {"node:__internal_head__": 1.0}}], "a") == busy  # workers will start


def test_one_worker_may_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ClusterConfig(address="local", workers=1, gpus_per_worker=0.5).check_training()
    ClusterConfig(address="local", workers=2, gpus_per_worker=0.5).check_here()  # the feature pass shares GPUs too


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 0},
        {"cpus_per_worker": 0.0},
        {"gpus_per_worker": -1.0},
        {"gpus_per_worker": 1.5},
        {"min_workers": 3},
        {"min_workers": 0},
        {"resize_minutes": 0.0},
        {"collective_minutes": 0.0},
        {"memory_per_worker": -1.0},
        {"resources_per_worker": {"GPU": 1.0}},
        {"resources_per_worker": {"spot": 0.0}},
        {"accelerator_type": "L4"},
    ],
    ids=str,
)
def test_resources_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        ClusterConfig(**settings)


def test_workers_ask_for_their_resources_and_place() -> None:
    cluster = ClusterConfig(
        workers=4,
        min_workers=2,
        gpus_per_worker=1,
        memory_per_worker=16,
        resources_per_worker={"spot": 1},
        accelerator_type="L4",
        labels={"market-type": "spot"},
    )
    assert cluster.worker_resources == {"CPU": 1, "GPU": 1, "memory": 16e9, "spot": 1}
    placed = {"accelerator_type": "L4", "label_selector": {"market-type": "spot"}}
    assert cluster.remote_options == placed | {"num_cpus": 1, "num_gpus": 1, "memory": 16e9, "resources": {"spot": 1}}
    assert ClusterConfig().remote_options == {"num_cpus": 1}
    assert [number_of_workers(one) for one in (cluster, ClusterConfig(), ClusterConfig(min_workers=2))] == [
        (2, 4),
        2,
        2,
    ]
    assert format_resources(cluster.worker_resources) == "1 CPU and 1 GPU and 16 GB of memory and 1 spot"


def test_a_folder_that_is_not_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--adapter", str(tmp_path / "nothing"), "--storage", str(tmp_path)]
    assert cli.run(evaluate.main, EvaluateJob, None, argv) == 2
    assert "not an adapter folder" in printed_error(capsys)


def test_a_recipe_is_checked_without_loading_weights() -> None:
    shape, labels = inspect(BackboneConfig())
    assert labels is None
    assert (shape.hidden_size, shape.num_layers) == (384, 6)
    with pytest.raises(UserError, match=r"384.*5"):
        check(Recipe(method=MethodConfig(num_inputs=5)), shape)


def test_every_worker_refuses_texts_that_leave_no_room_for_added_tokens(
    tiny_model_folder: Path, tiny_csv: Path
) -> None:
    """Otherwise only the worker with a long text would fail, and the others would wait for it."""
    backbone = BackboneConfig(model=str(tiny_model_folder), max_length=38)
    recipe = Recipe(backbone, DataConfig(str(tiny_csv)), MethodConfig("datamux", 2, 1, {"demultiplexer": "index"}))
    with pytest.raises(UserError, match=r"max_length is 38 .* at most 40; choose max_length 37 or fewer"):
        prepare(recipe, load_task(recipe.data))


def test_only_settings_that_affect_the_weights_start_a_new_run(tiny_csv: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    data = DataConfig(source=str(tiny_csv))
    task, recipe = load_task(data), Recipe(BackboneConfig(model=str(model), max_length=16), data)
    first = fingerprint(recipe, task)
    elsewhere = StoreConfig(root=str(tmp_path / "a"), copies=str(tmp_path / "b"), budget_gb=1)
    assert fingerprint(replace(recipe, store=elsewhere, shuffles=3), task) == first
    assert fingerprint(replace(recipe, store=StoreConfig(dtype="float32")), task) != first
    assert fingerprint(replace(recipe, method=MethodConfig(num_inputs=4)), task) != first
    write_tiny_model(model, seed=1)
    assert fingerprint(recipe, task) != first, "other weights at the same path"


def test_settings_come_from_yaml_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("space: wide\noptim: {epochs: 7, learning_rate: 0.002}\n")
    job = cli.parse(TuneJob, None, ["--config", str(tmp_path / "job.yaml"), "--optim.epochs", "3"])
    assert (job.space, job.optim.epochs, job.optim.learning_rate) == ("wide", 3, 0.002)


def test_a_relative_model_folder_becomes_absolute_for_trials_and_replicas(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    monkeypatch.chdir(tiny_model_folder.parent)
    seen: list[TuneJob] = []
    flags = ["--backbone.model", tiny_model_folder.name, "--store.root", "features"]
    assert cli.run(seen.append, TuneJob, None, flags) == 0
    recipe = base_recipe(seen[0])
    assert recipe.backbone.model == str(tiny_model_folder)
    assert store_in(Path("/runs"), recipe.store).root == str(tiny_model_folder.parent / "features")
    for other in ("all-MiniLM-L6-v2", "someone/classifier"):
        cli.run(seen.append, TuneJob, None, ["--backbone.model", other])
        assert seen[-1].backbone.model == other


def test_features_are_stored_in_the_storage_folder_unless_another_folder_is_given(tmp_path: Path) -> None:
    assert store_in(tmp_path, StoreConfig()).root == str(tmp_path / "features")
    assert store_in(tmp_path, StoreConfig(root="s3://bucket/features")).root == "s3://bucket/features"
    assert store_in(tmp_path, StoreConfig(root="/mnt/features")).root == "/mnt/features"


def test_a_submitted_feature_job_needs_a_storage_folder_only_for_the_default_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage_of(FeaturesJob(store=StoreConfig(root="s3://bucket/features"))) is None
    assert storage_of(FeaturesJob(storage=str(tmp_path / "runs"))) == str(tmp_path / "runs")
    with pytest.raises(UserError, match="storage 'runs' is relative"):
        storage_of(FeaturesJob())


def test_lora_tunes_an_adapter_on_a_whole_model_only(
    tmp_path: Path, tiny_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = FinetuneJob(frozen_layers=2, lora_rank=4).recipe()
    assert (recipe.method.prefill_layers, recipe.method.options) == (2, {"peft_rank": 4})
    with pytest.raises(UserError, match="lora_rank is 4, which trains a classification head, but soft_prompt is set"):
        FinetuneJob(lora_rank=4, soft_prompt=2)
    base = write_tiny_model(tmp_path / "base")
    adapter, _ = write_peft(tmp_path / "adapter", base)
    flags = ["--backbone.model", str(adapter), "--data.source", str(tiny_csv), "--lora_rank", "4"]
    assert finetune.command(flags) != 0
    assert "is a PEFT adapter" in printed_error(capsys)
    whole = replace(recipe, backbone=BackboneConfig(str(base)), method=replace(recipe.method, prefill_layers=3))
    with pytest.raises(UserError, match="prefill_layers is 3, so that LoRA has no layer of 3"):
        check(whole, inspect(whole.backbone)[0])
