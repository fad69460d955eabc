"""The input of bulk classification: how files are found and read, and which are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from bulk_jobs import answers
from pyarrow import parquet
from pyarrow.fs import FileSystem
from serving_models import text

from revmux import UserError
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.bulk.job import list_and_prepare
from revmux.bulk.units import list_work

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "arrow", "parquet"])
def test_every_format_has_the_same_answers(suffix: str, bulk_config: BulkConfig, tmp_path: Path) -> None:
    texts = [text(index) for index in range(50)]
    texts[7] = 'a "quoted"\nline, and a comma' if suffix != "tsv" else 'a "quoted" line'
    frame = pd.DataFrame({"text": texts, "id": [str(index) for index in range(50)]})
    file = tmp_path / f"data.{suffix}"
    if suffix in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="\t" if suffix == "tsv" else ",", quoting=3 if suffix == "tsv" else 0)
    elif suffix in ("jsonl", "json"):
        frame.to_json(file, orient="records", lines=True)
    elif suffix == "arrow":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, 20)
    else:
        frame.to_parquet(file, index=False)
    bulk_config = replace(bulk_config, input=str(file), unit_rows=16)
    assert classify_files(bulk_config).totals.rows == 50
    found = answers(bulk_config)
    assert found["text"].tolist() == texts
    assert found["id"].tolist() == frame["id"].tolist()
    assert found["label"].notna().all()


def test_bad_rows_become_rows_with_an_error(bulk_config: BulkConfig, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "w1 w2"}).encode(),
        json.dumps({"text": ""}).encode(),
        json.dumps({"text": 7}).encode(),
        json.dumps({"other": "x"}).encode(),
        b"{not json",
        b'{"text": "w1 \xff"}',
        json.dumps({"text": "w3"}).encode(),
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    bulk_config = replace(bulk_config, input=str(tmp_path / "bad.jsonl"))
    report = classify_files(bulk_config)
    assert (report.totals.rows, report.totals.errors) == (7, 5)
    found = answers(bulk_config)
    assert found["error"].isna().tolist() == [True, False, False, False, False, False, True]
    assert found["label"].notna().tolist() == [True, False, False, False, False, False, True]
    for error, words in zip(found["error"][1:6], ("empty", "int", "missing", "not JSON", "UTF-8")):
        assert words in error


def test_keys_that_the_first_object_lacks_are_kept(bulk_config: BulkConfig, tmp_path: Path) -> None:
    objects = [{"text": "w1"}, {"text": "w2", "customer": "a"}, {"text": "w3", "day": 4}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, objects)))
    bulk_config = replace(bulk_config, input=str(tmp_path / "rows.jsonl"))
    classify_files(bulk_config)
    found = answers(bulk_config)
    assert list(found.columns)[:3] == ["text", "customer", "day"]
    assert found["customer"].fillna("").tolist() == ["", "a", ""]
    assert found["day"].fillna("").tolist() == ["", "", "4"]


def test_a_file_of_json_lines_may_lack_a_kept_key(bulk_config: BulkConfig, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a.jsonl").write_text(1100 * "\n" + '{"text": "w1", "customer": "a"}\n')
    (tmp_path / "many" / "b.jsonl").write_text('{"text": "w2"}\n')
    bulk_config = replace(bulk_config, input=str(tmp_path / "many"))
    classify_files(bulk_config)
    assert answers(bulk_config)["customer"].fillna("").tolist() == ["a", ""]


def test_undecodable_parquet_and_short_csv_rows_are_bad_rows(bulk_config: BulkConfig, tmp_path: Path) -> None:
    wrong = pa.StringArray.from_buffers(3, *pa.array([b"w1", b"\xff", b"w2"], pa.binary()).buffers()[1:])
    parquet.write_table(pa.table({"text": wrong}), tmp_path / "wrong.parquet")
    bulk_config = replace(bulk_config, input=str(tmp_path / "wrong.parquet"), keep_columns=[])
    classify_files(bulk_config)
    assert answers(bulk_config)["error"].isna().tolist() == [True, False, True]
    (tmp_path / "short.csv").write_bytes(b"id,text\n1,w1 w2\n2\n3,\xffw\n\n4,w4\n")
    bulk_config = replace(
        bulk_config, input=str(tmp_path / "short.csv"), output=str(tmp_path / "other"), keep_columns=["id"]
    )
    classify_files(bulk_config)
    found = answers(bulk_config)
    assert found["id"].tolist() == ["1", "2", "3", "4"]
    assert found["error"].isna().tolist() == [True, False, False, True]


@pytest.mark.parametrize("source", ["folder", "glob", "uri", "deep glob"])
def test_folders_globs_and_uris_are_listed(source: str, bulk_config: BulkConfig, tmp_path: Path) -> None:
    folder = tmp_path / "many files"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.parquet", "a.parquet", "deep/c.parquet", "_hidden.parquet"):
        pd.DataFrame({"text": ["w1"]}).to_parquet(folder / name)
    pd.DataFrame({"text": ["w1"]})[:0].to_parquet(folder / "empty.parquet")
    (folder / "notes.md").write_text("no data")
    sources = {
        "folder": str(folder),
        "glob": f"{folder}/*.parquet",
        "uri": folder.as_uri(),
        "deep glob": f"{folder.as_uri()}/**/*.parquet",
    }
    work = list_work(replace(bulk_config, input=sources[source]))
    expected = ["a.parquet", "b.parquet", *([] if source == "glob" else ["deep/c.parquet"])]
    assert [Path(unit.file).relative_to(folder).as_posix() for unit in work.units] == expected
    assert len(work.ignored) == (1 if source in ("folder", "uri") else 0)


Mistake = Callable[[BulkConfig, Path], BulkConfig]


def _with_file(name: str, content: bytes) -> Mistake:
    def mistake(bulk_config: BulkConfig, folder: Path) -> BulkConfig:
        (folder / name).write_bytes(content)
        return replace(bulk_config, input=str(folder / name))

    return mistake


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda bulk_config, folder: replace(bulk_config, input=str(folder / "nowhere.csv")), "cannot find input"),
        (lambda bulk_config, folder: replace(bulk_config, input=str(folder / "*.csv")), "cannot find a file for input"),
        (lambda bulk_config, folder: replace(bulk_config, text_column="body"), "unknown text_column 'body'"),
        (lambda bulk_config, folder: replace(bulk_config, text_column="id"), "is int64, not text"),
        (lambda bulk_config, folder: replace(bulk_config, keep_columns=["name"]), "has no column 'name'"),
        (lambda bulk_config, folder: replace(bulk_config, output=bulk_config.input + "/out"), "is inside the input"),
        (lambda bulk_config, folder: replace(bulk_config, input=str(folder)), "is inside the input"),
        (_with_file("rows.xlsx", b"PK"), "known suffixes"),
        (_with_file("broken.parquet", b"PAR1 and no footer"), "cannot read"),
        (_with_file("empty.csv", b""), "no rows"),
        (_with_file("array.json", b'[{"text": "w1"}]'), "JSON array"),
        (_with_file("open.csv", b'text\n"never closed' + b"x" * (1 << 24) + b"\n"), "a quote may not be closed"),
        (_with_file("repeated.csv", b"text,label,,\nw1,2,,\n"), "are both named ''; rename one in the header"),
        (_with_file("labelled.csv", b"text,label\nw1,2\n"), "choose --column_prefix"),
        (lambda bulk_config, folder: replace(bulk_config, adapter=str(folder)), "not an adapter folder"),
        (lambda bulk_config, folder: replace(bulk_config, price=0.0), "price is 0.0; choose more than 0"),
    ],
)
def test_mistakes_in_the_input_are_found_before_a_model_is_loaded(
    mistake: Mistake, words: str, bulk_config: BulkConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        list_and_prepare(mistake(bulk_config, tmp_path))
    assert words in str(refused.value)
    assert not Path(bulk_config.output).exists()


def test_files_of_one_input_have_the_same_types(bulk_config: BulkConfig, tmp_path: Path) -> None:
    pd.DataFrame({"id": ["x"], "text": ["w1"]}).to_parquet(tmp_path / "zother.parquet")
    with pytest.raises(UserError, match=r"column 'id' is (large_)?string in .*zother\.parquet'?, but int64 in"):
        list_work(replace(bulk_config, input=f"{tmp_path}/*.parquet"))


def test_input_and_output_may_be_on_an_object_store(bulk_config: BulkConfig, tmp_path: Path) -> None:
    """A filesystem without renames of open files, locks and memory maps."""
    classify_files(bulk_config)
    store = "fsspec+memory:///bucket"
    filesystem, _ = FileSystem.from_uri(store)
    filesystem.create_dir("/bucket/in")
    with filesystem.open_output_stream("/bucket/in/rows.parquet") as stream:
        stream.write(Path(bulk_config.input).read_bytes())
    remote = replace(bulk_config, input=f"{store}/in/*.parquet", output=f"{store}/out")
    assert classify_files(remote).is_complete
    table = parquet.read_table("/bucket/out", filesystem=filesystem)
    assert table.to_pydict() == parquet.read_table(bulk_config.output).to_pydict()
    assert classify_files(remote).resumed == 4
    with pytest.raises(UserError, match="is inside the input"):
        classify_files(replace(remote, input=store))


READ_LAST_ROWS = """
import resource, sys
from pyarrow.fs import LocalFileSystem
from revmux.bulk.formats import Columns, Range, format_of
path, rows = sys.argv[1], int(sys.argv[2])
read = format_of(path).read(LocalFileSystem(), path, Range(rows - 1000, rows, 1000), Columns("text", None, ()))
assert len(read.texts) == 1000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """A unit at the end of a row group reads only its own rows into memory."""

    def peak(rows: int) -> int:
        file = tmp_path / f"{rows}.parquet"
        parquet.write_table(pa.table({"text": [f"w{row} " * 40 for row in range(rows)]}), file, row_group_size=rows)
        command = [sys.executable, "-c", READ_LAST_ROWS, str(file), str(rows)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(400_000) < 1.4 * peak(4_000)  # the large file has 110 MB of text
