"""Models, data and adapters on S3, which moto's server stands in for on this machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from pyarrow.fs import S3FileSystem, copy_files
from serving_models import write_adapter

from ray_jobs import cli, train
from ray_jobs.training.config import TrainJob
from revmux import UserError
from revmux.adapters.config import load_adapter_config
from revmux.adapters.folder import load_adapter
from revmux.data.config import DataConfig
from revmux.data.peek import check_source
from revmux.data.task import load_task
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.utils.copies import local_copy


@pytest.fixture
def bucket(s3: S3FileSystem, tmp_path: Path) -> str:
    """The URI of a folder of its own."""
    return f"s3://bucket/{tmp_path.name}"


def put(s3: S3FileSystem, source: Path, uri: str) -> str:
    copy_files(str(source), uri.removeprefix("s3://"), destination_filesystem=s3)
    return uri


def test_a_model_and_its_adapter_are_those_of_the_disk(
    s3: S3FileSystem, bucket: str, tiny_pretrained: Pretrained, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = put(s3, tiny_model_folder, f"{bucket}/{tiny_model_folder.name}")
    loaded = load_pretrained(BackboneConfig(model=model, max_length=16))
    assert loaded.identity == tiny_pretrained.identity
    adapter = put(s3, write_adapter(tmp_path, tiny_pretrained, 2), f"{bucket}/adapters/n2")
    assert load_adapter_config(adapter).num_inputs == 2
    assert load_adapter(adapter, loaded).method.num_inputs == 2


def test_data_is_that_of_the_disk(s3: S3FileSystem, bucket: str, tiny_csv: Path, tmp_path: Path) -> None:
    here, there = (DataConfig(str(tiny_csv)), DataConfig(put(s3, tiny_csv, f"{bucket}/{tiny_csv.name}")))
    check_source(there)
    assert load_task(there).identity == load_task(here).identity
    with pytest.raises(UserError, match="unknown text_column 'body'"):
        check_source(DataConfig(there.source, text_column="body"))
    for name in ("train", "dev"):
        put(s3, tiny_csv, f"{bucket}/glue/{name}.csv")
    assert len(load_task(DataConfig(f"{bucket}/glue")).test) == len(tiny_csv.read_text().splitlines()) - 1


def test_content_is_copied_once_and_again_after_a_change(
    s3: S3FileSystem, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []

    def counting(source: str, *arguments: Any, **more: Any) -> None:
        copied.append(source)
        copy_files(source, *arguments, **more)

    monkeypatch.setattr(pyarrow.fs, "copy_files", counting)
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder/deep/one.txt").write_text("first")
    uri = put(s3, tmp_path / "folder", f"{bucket}/folder")
    with ThreadPoolExecutor(8) as threads:  # all ask at once
        (first,) = set(threads.map(local_copy, [uri] * 8))
    assert (first.name, (first / "deep/one.txt").read_text()) == ("folder", "first")
    assert len(copied) == 1
    (tmp_path / "folder/deep/one.txt").write_text("second")
    put(s3, tmp_path / "folder", uri)
    second = local_copy(uri)
    assert (second / "deep/one.txt").read_text() == "second"
    assert (first / "deep/one.txt").read_text() == "first", "another process may use it"
    assert local_copy((tmp_path / "folder").as_uri()) == tmp_path / "folder"
    assert len(copied) == 2


def test_a_copy_that_fails_leaves_nothing(
    s3: S3FileSystem, bucket: str, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = put(s3, tiny_csv, f"{bucket}/{tiny_csv.name}")

    def full(source: str, target: str, **more: Any) -> None:
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.fs, "copy_files", full)
        with pytest.raises(UserError, match=r"No space left on device.*XDG_CACHE_HOME"):
            local_copy(uri)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert local_copy(uri).read_bytes() == tiny_csv.read_bytes()


def test_mistakes_are_one_line(
    bucket: str, tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ["--backbone.model", str(tiny_model_folder), "--data.source", str(tiny_csv), "--storage", str(tmp_path)]
    for flags, words in {
        ("--backbone.model", f"{bucket}/nothing"): f"cannot read '{bucket}/nothing'",
        ("--data.source", f"{bucket}/nothing.csv"): f"cannot read '{bucket}/nothing.csv'",
        ("--storage", f"{bucket}/runs"): "is a URI, but MLflow's default database is a file",
    }.items():
        assert cli.run(train.main, TrainJob, None, [*right, *flags]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert words in line
