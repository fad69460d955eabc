"""Storages on Google Cloud and on Azure, which emulators stand in for on this machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pyarrow as pa
import pytest
from fsspec.registry import known_implementations
from mlflow import MlflowClient
from polling import wait_until
from pyarrow import parquet
from pyarrow.fs import FileSystem, copy_files
from ray_machines import kill_group
from serving_http import free_port

from ray_jobs import cli, train
from ray_jobs.paths import absolute_storage
from ray_jobs.training.config import TrainJob
from revmux import UserError
from revmux.bulk import location
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.utils.copies import join_location
from revmux.utils.place import Place

AZURITE = shutil.which("azurite-blob")
ACCOUNT, KEY = (
    "devstoreaccount1",
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
)
"""The account that every Azurite has, by its documentation."""


@contextmanager
def emulator(port: int, *command: str) -> Iterator[None]:
    """Run a server until the end of the context, which begins when it listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def listens() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(listens, failure=lambda: None if process.poll() is None else f"{command} ended")
        yield
    finally:
        kill_group(process)


def google() -> Iterator[str]:
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    with emulator(port, sys.executable, str(Path(__file__).with_name("gcs_emulator.py")), str(port)):
        yield f"gs://anonymous@bucket?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=10"


def azure() -> Iterator[str]:
    if AZURITE is None:
        pytest.skip("azurite-blob is not installed; run: npm install -g azurite")
    port = free_port()
    flags = ["--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    with emulator(port, AZURITE, *flags):
        uri = f"abfs://{ACCOUNT}@127.0.0.1:{port}/bucket?enable_tls=false&{access()}"
        filesystem, bucket = FileSystem.from_uri(uri)
        filesystem.create_dir(bucket)
        yield uri


def access() -> str:
    """A signature for the account, since pyarrow takes no key from a URI."""
    values = {
        "sp": "rwdlacup",
        "ss": "b",
        "srt": "sco",
        "se": "2100-01-01T00:00:00Z",
        "spr": "https,http",
        "sv": "2021-12-02",
    }
    signed = [
        ACCOUNT,
        *(values.get(name, "") for name in ("sp", "ss", "srt", "st", "se", "sip", "spr", "sv", "ses")),
        "",
    ]
    code = hmac.digest(base64.b64decode(KEY), "\n".join(signed).encode(), hashlib.sha256)
    return urlencode(values | {"sig": base64.b64encode(code).decode()})


@pytest.fixture(scope="module", params=[google, azure], ids=["gs", "abfs"])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URI of an empty bucket."""
    yield from request.param()


def test_files_are_written_moved_and_locked(store: str) -> None:
    place = Place.open(join_location(store, "folder"))
    place.create()
    place.put("one", b"first")
    place.put("one", b"second")
    with place.writing("two", lambda digest: f"two.{len(digest)}") as sink:
        sink.write(b"third")
    assert place.files() == ["one", "two.32"]
    assert place.get("two.32") == b"third"
    place.move("one", place.child("below"))
    assert place.files_below() == ["below/one", "two.32"]
    assert place.child("below").get("one") == b"second"
    with place.exclusive("lock", wait=False) as holds:
        assert holds()
        with pytest.raises(UserError, match="another process"), place.exclusive("lock", wait=False):
            pass
    place.remove_file("two.32")
    assert place.files() == []


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_adapter_is_trained_and_classifies_on_the_store(
    store: str,
    tiny_model_folder: Path,
    tiny_csv: Path,
    mlflow_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    database = tmp_path / "mlflow.db"
    database.write_bytes(mlflow_database.read_bytes())
    # Otherwise MLflow would need the client libraries of the cloud. Its server writes elsewhere, too.
    MlflowClient(f"sqlite:///{database}").create_experiment(
        "revmux", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    place = Place.open(store)
    copy_files(str(tiny_model_folder), place.file("model"), destination_filesystem=place.filesystem)
    copy_files(str(tiny_csv), place.file("tiny.csv"), destination_filesystem=place.filesystem)
    model, data, storage = (join_location(store, name) for name in ("model", "tiny.csv", "runs"))
    flags = [f"--backbone.model={model}", "--backbone.max_length=16", f"--data.source={data}", f"--storage={storage}"]
    flags += [
        "--num_inputs=[2]",
        "--method.prefill_layers=1",
        "--optim.epochs=2",
        "--optim.batch_size=8",
        "--shuffles=1",
    ]
    flags += [f"--tracking.uri=sqlite:///{database}", "--cluster.workers=1", "--cluster.address=local"]
    assert cli.run(train.main, TrainJob, None, flags) == 0
    signature = parse_qs(urlsplit(store).query).get("sig", ["no signature"])[0]
    assert quote(signature, safe="") not in capsys.readouterr().out
    adapter = join_location(storage, "adapters/revmux-n2-l1")
    assert "adapter_config.json" in Place.open(adapter).files()
    output = join_location(store, "out")
    config = BulkConfig(input=data, output=output, model=model, adapter=adapter, column_prefix="predicted_")
    assert classify_files(config).is_complete
    found = Place.open(output)
    (part,) = [name for name in found.files() if name.endswith(".parquet")]
    assert len(parquet.read_table(found.filesystem.open_input_file(found.file(part)))) == 80
    assert Place.open(join_location(storage, "running")).files() == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        known_implementations, "cloud", {"class": "nosuchpackage.Cloud", "err": "Please install nosuchpackage"}
    )
    for opened in (absolute_storage, location.list_files, Place.open):
        with pytest.raises(
            UserError, match=r"'fsspec\+cloud://bucket' \(Please install nosuchpackage\); install that package"
        ):
            opened("fsspec+cloud://bucket")
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        absolute_storage("fsspec+nosuch://bucket")


def test_errors_of_a_cloud_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow reports missing credentials of Azure by an error of its own."""

    def refuse(*_: object) -> None:
        raise pa.ArrowException("Unknown error: no credentials")

    monkeypatch.setattr(Place, "put", refuse)
    with pytest.raises(UserError, match=r"storage 'fsspec.*' cannot be written \(Unknown error: no credentials\)"):
        absolute_storage("fsspec+memory:///bucket")
    monkeypatch.setattr(location, "_named", refuse)
    with pytest.raises(UserError, match=r"cannot list input 'fsspec.*' \(Unknown error: no credentials\)"):
        location.list_files("fsspec+memory:///bucket")
