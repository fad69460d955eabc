"""Bulk classification without Ray: units, bad rows, resuming, refusals and audits."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from pyarrow.fs import FileSystem
from serving_models import load, text, write_adapter, write_model

from revmux import TextClassifier, UserError
from revmux.bulk.audit import Agreement
from revmux.bulk.classify import classify_files, warn_agreement
from revmux.bulk.config import BulkConfig
from revmux.bulk.formats.base import Range, divide_blocks
from revmux.bulk.job import list_and_prepare, prepare_job
from revmux.bulk.output import META, OutputFolder
from revmux.bulk.progress import Progress
from revmux.bulk.score import classify_tokens
from revmux.bulk.summary import write_summary
from revmux.bulk.texts import Tokenizer
from revmux.bulk.units import Unit, list_work
from revmux.bulk.worker import Finished, Worker
from revmux.data.padding import Padder
from revmux.pretrained.encoder import Encoder

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives every input the plain model's answer, in groups of four."""
    return write_adapter(tmp_path_factory.mktemp("adapters"), load(model), 4)


@pytest.fixture
def config(model: Path, adapter: Path, tmp_path: Path) -> BulkConfig:
    """200 rows in two row groups of a Parquet file, in units of 64 rows."""
    frame = pd.DataFrame({"id": range(200), "text": [text(index) for index in range(200)]})
    frame.to_parquet(tmp_path / "rows.parquet", index=False, row_group_size=150)
    return BulkConfig(
        input=str(tmp_path / "rows.parquet"),
        output=str(tmp_path / "out"),
        model=str(model),
        adapter=str(adapter),
        unit_rows=64,
        max_batch_tokens=256,
    )


def parts(config: BulkConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(config.output).glob("part-*.parquet"))}


def answers(config: BulkConfig) -> pd.DataFrame:
    return pa.concat_tables(
        parquet.read_table(path) for path in sorted(Path(config.output).glob("*.parquet"))
    ).to_pandas()


def test_every_row_gets_its_own_answer_in_the_order_of_the_input(config: BulkConfig, model: Path) -> None:
    report = classify_files(config)
    assert report.is_complete
    assert report.totals.rows == 200
    found = answers(config)
    assert found["id"].tolist() == list(range(200))
    plain = load(model)
    plain.backbone.freeze()
    scores = plain.backbone(plain.encode([text(index) for index in range(200)], max_length=64)).softmax(-1)
    assert found["label"].tolist() == [plain.backbone.label_names[index] for index in scores.argmax(1).tolist()]
    assert found["score"].to_numpy() == pytest.approx(scores.amax(1).numpy(), abs=1e-5)
    assert set(found["width"]) == {4}
    assert set(found["method"]) == {"token-split"}
    assert not found["fell_back"].any()
    assert found["error"].isna().all()
    assert report.totals.relative_cost < 0.9


def test_the_readers_of_parquet_folders_see_only_the_parts(config: BulkConfig) -> None:
    classify_files(config)
    assert parquet.read_table(config.output).num_rows == 200
    manifest = json.loads((Path(config.output) / META / "manifest.json").read_text())
    assert manifest["rows"] == 200
    assert [part["name"] for part in manifest["parts"]] == list(parts(config))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "arrow", "parquet"])
def test_every_format_has_the_same_answers(suffix: str, config: BulkConfig, tmp_path: Path) -> None:
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
    config = replace(config, input=str(file), unit_rows=16)
    assert classify_files(config).totals.rows == 50
    found = answers(config)
    assert found["text"].tolist() == texts
    assert found["id"].tolist() == frame["id"].tolist()
    assert found["label"].notna().all()


def test_bad_rows_become_rows_with_an_error(config: BulkConfig, tmp_path: Path) -> None:
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
    config = replace(config, input=str(tmp_path / "bad.jsonl"))
    report = classify_files(config)
    assert (report.totals.rows, report.totals.errors) == (7, 5)
    found = answers(config)
    assert found["error"].isna().tolist() == [True, False, False, False, False, False, True]
    assert found["label"].notna().tolist() == [True, False, False, False, False, False, True]
    for error, words in zip(found["error"][1:6], ("empty", "int", "missing", "not JSON", "UTF-8")):
        assert words in error


def test_undecodable_parquet_and_short_csv_rows_are_bad_rows(config: BulkConfig, tmp_path: Path) -> None:
    wrong = pa.StringArray.from_buffers(3, *pa.array([b"w1", b"\xff", b"w2"], pa.binary()).buffers()[1:])
    parquet.write_table(pa.table({"text": wrong}), tmp_path / "wrong.parquet")
    config = replace(config, input=str(tmp_path / "wrong.parquet"), keep_columns=[])
    classify_files(config)
    assert answers(config)["error"].isna().tolist() == [True, False, True]
    (tmp_path / "short.csv").write_bytes(b"id,text\n1,w1 w2\n2\n3,\xffw\n\n4,w4\n")
    config = replace(config, input=str(tmp_path / "short.csv"), output=str(tmp_path / "other"), keep_columns=["id"])
    classify_files(config)
    found = answers(config)
    assert found["id"].tolist() == ["1", "2", "3", "4"]
    assert found["error"].isna().tolist() == [True, False, False, True]


def test_a_retried_unit_writes_the_same_bytes_whatever_ran_before(config: BulkConfig) -> None:
    classify_files(config)
    before = parts(config)
    job, work = list_and_prepare(config)
    other = Worker(job, "cpu")
    for unit in reversed(work.units):
        other.run(unit)
    assert parts(config) == before
    assert len(before) == 4


def test_the_same_call_continues_and_computes_nothing_twice(
    config: BulkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify_files(config)
    before = parts(config)
    lost = sorted(Path(config.output).glob("part-*.parquet"))[1]
    lost.rename(f"{lost}.{'0' * 32}.tmp")  # as if its writer had been killed
    ran: list[int] = []
    original = Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, unit: (ran.append(unit.number), original(self, unit))[1])
    report = classify_files(config)
    assert ran == [1]
    assert report.resumed == 3
    assert parts(config) == before
    assert report.totals.rows == parquet.read_table(config.output).num_rows == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 8}, "system.max_length 64, but this command has 8"),
        ({"unit_rows": 100}, "unit_rows 64, but this command has 100"),
        ({"threshold": 0.5}, "system.threshold None, but this command has 0.5"),
        ({"keep_columns": ["id"]}, "columns.kept"),
    ],
)
def test_other_settings_need_another_output(config: BulkConfig, change: dict[str, Any], words: str) -> None:
    classify_files(config)
    before = parts(config)
    with pytest.raises(UserError, match="was started with") as refused:
        classify_files(replace(config, **change))
    assert words in str(refused.value)
    assert parts(config) == before


def test_changed_input_needs_another_output(config: BulkConfig) -> None:
    classify_files(config)
    pd.DataFrame({"id": range(200), "text": ["w1"] * 200}).to_parquet(config.input, row_group_size=150)
    with pytest.raises(UserError, match=r"was started with input\.sha256"):
        classify_files(config)


def test_a_failing_unit_is_left_out_after_its_attempts_and_can_be_tried_again(
    config: BulkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tries = Worker.run, []

    def poisoned(worker: Worker, unit: Unit) -> Finished:
        if unit.number == 2:
            tries.append(unit.number)
            raise RuntimeError("poison")
        return original(worker, unit)

    monkeypatch.setattr(Worker, "run", poisoned)
    report = classify_files(config)
    assert len(tries) == config.attempts == 3
    assert not report.is_complete
    (failed,) = report.failed
    assert failed.error == "RuntimeError: poison"
    assert len(parts(config)) == 3
    assert not (Path(config.output) / META / "manifest.json").exists()
    monkeypatch.setattr(Worker, "run", original)
    assert classify_files(config).is_complete
    assert answers(config)["id"].tolist() == list(range(200))


def test_fallback_thresholds_are_applied_and_counted(config: BulkConfig) -> None:
    report = classify_files(replace(config, threshold=1.0, all_scores=True))
    found = answers(config)
    assert found["fell_back"].all()
    assert set(found["stage"]) == {0}
    assert report.totals.answered_by == {"0 siso N=1": 200}
    assert report.totals.relative_cost > 1
    assert found["scores"].map(len).tolist() == [3] * 200


def test_the_audit_compares_a_fixed_share_of_rows_with_the_plain_model(config: BulkConfig) -> None:
    report = classify_files(replace(config, audit=0.5))
    agreement = report.totals.agreement
    assert 60 < agreement.rows < 140
    assert agreement.agreed == agreement.rows
    again = classify_files(replace(config, audit=0.5, output=config.output + "2", unit_rows=32))
    assert again.totals.agreement == agreement  # the sample depends on neither units nor groups


def test_the_audit_stops_a_job_that_falls_below_the_floor(
    config: BulkConfig, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = write_adapter(tmp_path_factory.mktemp("random"), load(model), 4, method="revmux")  # untrained
    config = replace(config, adapter=str(other), audit=1.0, audit_floor=0.9, unit_rows=16)
    report = classify_files(config)
    assert report.stopped
    assert not report.is_complete
    assert report.totals.rows < 200
    assert report.totals.agreement.is_below(0.9)
    assert "agree with the plain model in" in (warn_agreement(report.totals.agreement, 0.99) or "")
    assert not (Path(config.output) / META / "manifest.json").exists()


def test_a_ladder_runs_its_stages_and_counts_their_cost(config: BulkConfig, model: Path, tmp_path: Path) -> None:
    pretrained = load(model)
    folders = []
    for stage, (method, width, layers, threshold) in enumerate(
        [("exit-head", 1, 1, 0.4), ("token-split", 2, 2, 0.6)], 1
    ):
        folder = write_adapter(tmp_path / str(stage), pretrained, width, layers, method)
        adapter_config = json.loads((folder / "adapter_config.json").read_text())
        adapter_config |= {"stage": stage, "fallback_threshold": threshold}
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
        folders.append(folder)
    plan = {"is_met": True, "served": [{"stages": [{"adapter": str(folder)} for folder in folders]}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    report = classify_files(replace(config, adapter=None, plan=str(tmp_path / "plan.json")))
    found = answers(config)
    assert set(found["stage"]) == {0, 1, 2}
    assert (found["stage"] == 0).tolist() == found["fell_back"].tolist()
    assert set(found["method"][found["stage"] == 1]) == {"exit-head"}
    assert set(found["method"][found["stage"] == 2]) == {"token-split"}
    assert report.totals.answered_by == {
        f"{stage} {name} N={width}": (found["stage"] == stage).sum()
        for stage, name, width in [(0, "siso", 1), (1, "exit-head", 1), (2, "token-split", 2)]
    }
    assert 0.25 < report.totals.relative_cost < 1.3


def test_an_adapter_that_saves_nothing_is_reported(
    config: BulkConfig, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classify_files(replace(config, adapter=str(write_adapter(tmp_path, load(model), 2, 4))))
    assert set(answers(config)["method"]) == {"siso"}
    assert "adapter token-split, N = 2, l = 4 is not used" in caplog.text


def test_reading_the_device_and_writing_overlap(config: BulkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit is written while another is on the device and a third is read: each step waits until it sees the others."""
    together = threading.Barrier(3, timeout=60)

    def meeting(number: int, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, whose call of this number waits for the other steps."""
        calls = itertools.count(1)

        def run(*arguments: Any, **more: Any) -> Any:
            if next(calls) == number:
                together.wait()
            return step(*arguments, **more)

        return run

    monkeypatch.setattr(Worker, "_write", meeting(1, Worker._write))
    monkeypatch.setattr("revmux.bulk.worker.classify_tokens", meeting(2, classify_tokens))
    monkeypatch.setattr(Worker, "_prepare", meeting(3, Worker._prepare))
    figures: dict[str, float] = {}
    report = classify_files(config, on_progress=lambda progress: figures.update(progress.metrics(1)))
    assert report.is_complete
    assert not together.broken
    assert 0 < figures["device_busy"] < 1


def test_a_job_has_the_price_of_the_time_of_all_its_starts(config: BulkConfig) -> None:
    config = replace(config, price=3600.0, audit=0.5)  # 1 per second
    first = classify_files(config)
    assert first.price is not None
    output = OutputFolder(config.output)
    assert first.price.so_far == pytest.approx(output.worker_seconds())
    assert first.price.per_million == pytest.approx(1e6 / 200 * first.price.so_far)
    # The plain model has no audit, so its price is compared with all that ran.
    totals = first.totals
    assert totals.cost + totals.audit_cost > totals.cost + 0.3 * 200
    assert first.price.plain == pytest.approx(first.price.so_far * 200 / (totals.cost + totals.audit_cost))
    assert classify_files(config).price == first.price  # nothing ran
    (Path(config.output) / list(parts(config))[1]).unlink()
    lines: list[str] = []
    second = classify_files(config, on_progress=lambda progress: lines.append(progress.line(1)))
    assert second.price is not None
    assert second.price.so_far > first.price.so_far
    assert f"price {second.price.so_far:,.2f}, a million rows {second.price.per_million:,.2f}" in lines[-1]
    job, _ = list_and_prepare(config)
    write_summary(output, second, job)
    page = (Path(config.output) / META / "summary.html").read_text()
    assert f"by counted cost</td><td>{second.price.plain:,.2f}</td>" in page
    assert classify_files(replace(config, price=None)).price is None


def test_the_time_of_a_job_is_that_of_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 10.0, 15.0])
    monkeypatch.setattr("revmux.bulk.progress.perf_counter", lambda: next(clock))
    progress = Progress([], {}, 1, worker_seconds=100.0)
    progress.charge(0)  # no machine yet
    progress.charge(3)
    assert progress.worker_seconds == 115.0


def test_the_interval_of_an_agreement_is_wilsons() -> None:
    low, high = Agreement(10, 10).interval()
    assert (low, high) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert not Agreement(10, 5).is_below(0.6)
    assert Agreement(1000, 500).is_below(0.6)
    assert Agreement().interval() == (0.0, 1.0)


def test_row_groups_are_joined_and_divided() -> None:
    assert divide_blocks([10, 10, 10, 100, 0, 5], 25) == [
        Range(0, 20, 20),
        Range(20, 30, 10),
        Range(30, 55, 25),
        Range(55, 80, 25),
        Range(80, 105, 25),
        Range(105, 130, 25),
        Range(130, 135, 5),
    ]


@pytest.mark.parametrize("source", ["folder", "glob", "uri", "deep glob"])
def test_folders_globs_and_uris_are_listed(source: str, config: BulkConfig, tmp_path: Path) -> None:
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
    work = list_work(replace(config, input=sources[source]))
    expected = ["a.parquet", "b.parquet", *([] if source == "glob" else ["deep/c.parquet"])]
    assert [Path(unit.file).relative_to(folder).as_posix() for unit in work.units] == expected
    assert len(work.ignored) == (1 if source in ("folder", "uri") else 0)


Mistake = Callable[[BulkConfig, Path], BulkConfig]


def _with_file(name: str, content: bytes) -> Mistake:
    def mistake(config: BulkConfig, folder: Path) -> BulkConfig:
        (folder / name).write_bytes(content)
        return replace(config, input=str(folder / name))

    return mistake


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda config, folder: replace(config, input=str(folder / "nowhere.csv")), "cannot find input"),
        (lambda config, folder: replace(config, input=str(folder / "*.csv")), "cannot find a file for input"),
        (lambda config, folder: replace(config, text_column="body"), "unknown text_column 'body'"),
        (lambda config, folder: replace(config, text_column="id"), "is int64, not text"),
        (lambda config, folder: replace(config, keep_columns=["name"]), "has no column 'name'"),
        (lambda config, folder: replace(config, output=config.input + "/out"), "is inside the input"),
        (lambda config, folder: replace(config, input=str(folder)), "is inside the input"),
        (_with_file("rows.xlsx", b"PK"), "known suffixes"),
        (_with_file("broken.parquet", b"PAR1 and no footer"), "cannot read"),
        (_with_file("empty.csv", b""), "no rows"),
        (_with_file("array.json", b'[{"text": "w1"}]'), "JSON array"),
        (_with_file("open.csv", b'text\n"never closed' + b"x" * (1 << 24) + b"\n"), "a quote may not be closed"),
        (_with_file("labelled.csv", b"text,label\nw1,2\n"), "choose --column_prefix"),
        (lambda config, folder: replace(config, adapter=str(folder)), "not an adapter folder"),
        (lambda config, folder: replace(config, price=0.0), "price is 0.0; choose more than 0"),
    ],
)
def test_mistakes_in_the_input_are_found_before_a_model_is_loaded(
    mistake: Mistake, words: str, config: BulkConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        list_and_prepare(mistake(config, tmp_path))
    assert words in str(refused.value)
    assert not Path(config.output).exists()


def test_files_of_one_input_have_the_same_types(config: BulkConfig, tmp_path: Path) -> None:
    pd.DataFrame({"id": ["x"], "text": ["w1"]}).to_parquet(tmp_path / "zother.parquet")
    with pytest.raises(UserError, match=r"column 'id' is (large_)?string in .*zother\.parquet'?, but int64 in"):
        list_work(replace(config, input=f"{tmp_path}/*.parquet"))


def test_a_used_folder_is_not_an_output(config: BulkConfig) -> None:
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="choose an empty folder"):
        classify_files(config)


def test_answers_in_bulk_are_those_of_the_classifier(config: BulkConfig, adapter: Path, model: Path) -> None:
    """The same groups as those that :class:`TextClassifier` forms of one unit, so the same scores."""
    classify_files(replace(config, unit_rows=200, max_batch_tokens=4096))
    classifier = TextClassifier.from_pretrained(adapter, model)
    expected = classifier([text(index) for index in range(200)], top_k=1)
    found = answers(config)
    assert found["label"].tolist() == [best[0][0] for best in expected]
    assert found["score"].to_numpy() == pytest.approx([best[0][1] for best in expected], abs=1e-5)


def test_input_and_output_may_be_on_an_object_store(config: BulkConfig, tmp_path: Path) -> None:
    """A filesystem without renames of open files, locks and memory maps."""
    classify_files(config)
    store = "fsspec+memory:///bucket"
    filesystem, _ = FileSystem.from_uri(store)
    filesystem.create_dir("/bucket/in")
    with filesystem.open_output_stream("/bucket/in/rows.parquet") as stream:
        stream.write(Path(config.input).read_bytes())
    remote = replace(config, input=f"{store}/in/*.parquet", output=f"{store}/out")
    assert classify_files(remote).is_complete
    table = parquet.read_table("/bucket/out", filesystem=filesystem)
    assert table.to_pydict() == parquet.read_table(config.output).to_pydict()
    assert classify_files(remote).resumed == 4
    with pytest.raises(UserError, match="is inside the input"):
        classify_files(replace(remote, input=store))


def test_the_summary_escapes_texts_and_shows_bad_rows(config: BulkConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "<script>alert(1)</script> $x$"}\n{"text": ""}\n')
    config = replace(config, input=str(tmp_path / "rows.jsonl"), audit=1.0)
    job, _ = list_and_prepare(config)
    report = classify_files(config)
    write_summary(OutputFolder(config.output), report, job)
    page = (Path(config.output) / META / "summary.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x$" in page
    assert "the text is empty" in page
    assert "100.00% of 1 audited rows" in page
    assert (Path(config.output) / META / "summary.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_that_of_the_tokenizer(side: str, model: Path) -> None:
    pretrained = load(model)
    padder = pretrained.tokenizer
    padder.padding_side = side
    padder.pad_token = "ok"  # an id other than 0, which fills the other tensors
    texts = [text(index) for index in range(6)]
    tokens, _ = Tokenizer(pretrained, 64).encode(texts, None)
    expected = padder([texts[index] for index in (3, 5, 0)], padding=True, return_tensors="pt")
    rows = tokens.padded([3, 5, 0], Padder(padder))
    encoder = Encoder(pretrained, 64)
    lists = Padder(padder).lists([encoder.encode(texts[index]).tokens for index in (3, 5, 0)])
    for found in (rows, lists):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_settings_of_an_output_contain_no_password(config: BulkConfig) -> None:
    secret = replace(config, input="s3://key:secret@bucket/rows")
    settings = prepare_job(secret, list_work(config)).settings
    assert settings["input"]["source"] == "s3://key:***@bucket/rows"
    assert "secret" not in json.dumps(settings)
