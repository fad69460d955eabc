"""Shared fixtures: tiny task models and replicas that serve them, tiny labelled files, and workers of a process group."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# The process that distributes the tests imports this file too. Fixtures import what only tests need.
if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

    from revmux.backbone import Backbone
    from revmux.bulk.config import BulkConfig
    from revmux.pretrained.pretrained import Pretrained
    from revmux.serving import Engine
    from serve_app.service import Service

os.environ["HF_HUB_OFFLINE"] = "1"  # set before any Hugging Face import, so that no test waits for a network
gc.disable()  # until the tests are collected: imports make many objects and few cycles

# Models this small gain nothing from threads that wait for each other; other numbers test that none changes a result.
THREADS = int(os.environ.get("REVMUX_TEST_THREADS", "1"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests among processes.

    Each file's tests stay in one process, so that shared fixtures are created once. Files that start Ray come first,
    because they wait most, those with the longest time limit before others, so that none of them runs alone at the end.
    Files that start Ray Serve stay in one process, because their proxies would compete for ports, and so do files that
    share a cluster.
    """
    clusters = {item.path: marker.args for item in items if (marker := item.get_closest_marker("cluster"))}
    limits: dict[Path, float] = {}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(*clusters.get(item.path) or (item.path.stem,)))
        if limit := item.get_closest_marker("timeout"):
            limits[item.path] = max(limits.get(item.path, 0), *limit.args)

    def place(item: pytest.Item) -> tuple[bool, bool, tuple[str, ...], float]:
        group = clusters.get(item.path) or ()
        return item.path not in clusters, not group, group, 0 if group else -limits.get(item.path, 0)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Search only objects that the tests make, and not those of the imported libraries, for cycles."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _own_ray_folder() -> Iterator[None]:
    """Give the clusters of this process a folder of their own, so that they and other clusters do not see each other."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        os.environ.pop(name, None)
    os.environ |= {"RAY_worker_niceness": "0"}  # on a busy machine, workers of a lower priority would not start in time
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # sockets need short paths
        os.environ["RAY_TMPDIR"] = folder
        yield


_shared_cluster = ExitStack()


@pytest.fixture(scope="module")
def ray_here() -> None:
    """The Ray cluster that the files of the group ``shared`` use one after the other. This process is its driver."""
    import ray

    from ray_jobs.cluster import ClusterConfig, connected

    if not ray.is_initialized():
        _shared_cluster.enter_context(connected(ClusterConfig(workers=1)))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the shared cluster after the last test of its group."""
    if nextitem is None or group_of(nextitem) != group_of(item):
        _shared_cluster.close()


def group_of(item: pytest.Item) -> str:
    """The group that :func:`pytest_collection_modifyitems` assigned."""
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])


@pytest.fixture(scope="session", autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the cache of the datasets library into a temporary folder."""
    import datasets

    former = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = former


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_pretrained(tiny_model_folder: Path) -> Pretrained:
    """Frozen and shared by all tests; a test that trains the backbone loads its own."""
    from revmux.pretrained.config import BackboneConfig
    from revmux.pretrained.loading import load_pretrained

    pretrained = load_pretrained(BackboneConfig(model=str(tiny_model_folder), max_length=16))
    pretrained.backbone.freeze()
    return pretrained


@pytest.fixture(scope="module")
def bert() -> Backbone:
    """A tiny BERT classifier."""
    from tiny_methods import tiny_bert

    return tiny_bert()


@pytest.fixture(scope="module")
def llama() -> Backbone:
    """A tiny LLaMA classifier."""
    from tiny_methods import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny language model, written once."""
    from tiny_models import write_language_model

    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = write_language_model(tmp_path_factory.mktemp("language") / f"tiny-{family}", family)
        return made[family]

    return find


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the prompt of these models."""
    from prompted_recipes import PROMPT

    file = tmp_path_factory.mktemp("prompt") / "mine.yaml"
    file.write_text(json.dumps({key: value for key, value in PROMPT.to_dict().items() if key != "name"}))
    return file


@pytest.fixture(scope="module")
def bert_base() -> Backbone:
    """A classifier of the size of BERT-base, without weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from revmux import cut

    config = BertConfig(attn_implementation="eager")
    with torch.device("meta"):
        return cut(BertForSequenceClassification(config)).freeze()


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, str]]:
    """80 texts of 3 to 9 words; those that begin with w1 are good, those with w2 bad."""
    import torch
    from tiny_models import LABELS, WORDS

    random = torch.Generator().manual_seed(0)
    rows = []
    for index in range(80):
        label = index % 2
        length = int(torch.randint(2, 9, (), generator=random))
        rest = torch.randint(3, len(WORDS), (length,), generator=random).tolist()
        rows.append({"text": " ".join(WORDS[word] for word in (2 - label, *rest)), "label": LABELS[label]})
    return rows


@pytest.fixture(scope="session")
def tiny_files(tiny_rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows in every format, by suffix."""
    import datasets
    import pandas as pd

    folder = tmp_path_factory.mktemp("data")
    frame = pd.DataFrame(tiny_rows)
    files = {suffix: folder / f"tiny.{suffix}" for suffix in ("csv", "tsv", "jsonl", "json", "parquet", "arrow")}
    frame.to_csv(files["csv"], index=False)
    frame.to_csv(files["tsv"], index=False, sep="\t")
    frame.to_json(files["jsonl"], orient="records", lines=True)
    files["json"].write_text(json.dumps(tiny_rows))
    frame.to_parquet(files["parquet"], index=False)
    saved = folder / "saved"
    datasets.Dataset.from_list(tiny_rows).save_to_disk(saved)
    next(saved.glob("*.arrow")).rename(files["arrow"])
    return files


@pytest.fixture(scope="session")
def tiny_csv(tiny_files: dict[str, Path]) -> Path:
    return tiny_files["csv"]


@pytest.fixture(scope="session")
def serving_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task model for engines; see ``write_model``."""
    from serving_models import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def serving_adapters(serving_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of adapters for N = 2 and 4, which give every input the answer of :func:`serving_model`."""
    from serving_models import load, write_adapter

    home = tmp_path_factory.mktemp("adapters")
    return [write_adapter(home, load(serving_model), num_inputs) for num_inputs in (2, 4)]


@pytest.fixture
def bulk_config(serving_model: Path, serving_adapters: list[Path], tmp_path: Path) -> BulkConfig:
    """A small bulk job with N = 4."""
    from bulk_jobs import small_job

    return small_job(serving_model, serving_adapters[1], tmp_path)


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of MLflow's records of one test, whichever records the process used before."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def pretrained(serving_model: Path) -> Pretrained:
    """The tiny task model of the tests of the engine."""
    from serving_models import load

    return load(serving_model)


@pytest.fixture
def make_engine(pretrained: Pretrained, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """See :func:`serving_models.engines_not_started`."""
    from serving_models import engines_not_started

    with engines_not_started(pretrained, tmp_path) as make:
        yield make


@pytest.fixture(scope="session")
def serving_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of two small tasks; tests copy the adapters that they change."""
    from serving_http import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def service(serving_tasks: dict[str, Any]) -> Iterator[Service]:
    """A replica that serves both tasks."""
    from serving_http import USUAL, serving

    with serving({"tasks": serving_tasks, **USUAL}, "engine-1") as made:
        yield made


@pytest.fixture
def held(serving_tasks: dict[str, Any]) -> Iterator[tuple[Service, threading.Event]]:
    """A replica in a forward pass that continues once the event is set; 40 texts may wait."""
    from serving_http import held_in_a_pass

    with held_in_a_pass({**serving_tasks["mood"], "max_queue": 40, "max_texts": 32}) as found:
        yield found


@pytest.fixture
def impatient_front_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let front ends look for an engine, or for a better one, every few milliseconds."""
    monkeypatch.setattr("serve_app.front_end.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("serve_app.front_end.BALANCE_SECONDS", 0.02)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3FileSystem]:
    """An empty bucket named ``bucket``. Every S3 client of this process and its children finds the server."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileSystem

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem, _ = FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        yield filesystem
    server.stop()


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store on sqlite; tests copy it to save the seconds of the migrations."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Call ``function(*arguments)`` in every process of a gloo group; returns their results by rank."""
    import torch

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["revmux.training.recipe", "transformers.models.bert.modeling_bert"])

    def run(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("workers")
        processes = [
            context.Process(target=_worker, args=(rank, world, folder, function, arguments)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return run


def _worker(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
