"""The bulk benchmark: its systems are what their names say, and the page shows its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import parquet

from benchmarks.bulk.__main__ import main
from benchmarks.bulk.page import bulk_words
from benchmarks.bulk.peak import peak_memory, write_rows
from benchmarks.bulk.rivals import Pipeline
from benchmarks.bulk.workloads import Workload
from benchmarks.rows import ratio_row, unmeasured_row
from benchmarks.serving.settings import Shape
from benchmarks.serving.workloads import write_shape
from revmux.bulk.classify import classify_files

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("bulk")
    found = Workload("tiny", "a tiny model", write_shape(folder / "tiny", Shape(32, 4, 2, 64)), 64)
    found.__dict__["texts"] = ["a good film " * (1 + index % 9) for index in range(found.rows)]
    return found


def test_every_system_uses_its_adapters_and_counts_less_than_the_plain_model(
    workload: Workload, tmp_path: Path
) -> None:
    systems = workload.systems()
    assert list(systems)[:2] == ["N = 4, l = 1", "N = 8, l = 1"]
    for number, (title, system) in enumerate(systems.items()):
        report = classify_files(workload.config(tmp_path / str(number), **system))
        assert report.is_complete
        assert len({answer.partition(" ")[0] for answer in report.totals.answered_by}) == (
            3 if "ladder" in title else 1
        )
        assert "0 siso N=1" not in report.totals.answered_by or "ladder" in title


def test_the_pipeline_gives_the_plain_models_answers(workload: Workload, tmp_path: Path) -> None:
    assert Pipeline(workload).rows_per_second(tmp_path / "theirs.parquet") > 0
    classify_files(workload.config(tmp_path / "ours"))
    ours, theirs = parquet.read_table(tmp_path / "ours"), parquet.read_table(tmp_path / "theirs.parquet")
    assert ours["label"].to_pylist() == theirs["label"].to_pylist()
    assert ours["score"].to_pylist() == pytest.approx(theirs["score"].to_pylist(), abs=1e-5)


def test_the_memory_figure_has_all_rows_and_the_peak_of_this_process(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", 10_500)
    found = parquet.ParquetFile(tmp_path / "rows.parquet")
    assert (found.metadata.num_rows, found.num_row_groups) == (10_500, 2)
    assert 50 < peak_memory() < 100_000


def test_the_page_shows_targets_and_what_was_not_measured() -> None:
    rows = [
        ratio_row("the function at N = 1 / transformers.pipeline", [1.5, 1.75, 2.0], 1.0),
        unmeasured_row("the function at N = 1 / infinity-emb's engine", "it ended with status 1", 1.0),
        ratio_row("peak memory", [1.2], 1.1) | {"bound": "at most"},
    ]
    meta = {
        "settings": {"pairs": 3, "group_pairs": 3, "group_scale": 4.0, "large_pairs": 1, "threads": 2},
        "machine": {"cores": 2},
        "commit": "abcdefghij",
    }
    meta |= {"versions": {"torch": "2.13", "ray": "2.60"}, "data": {"a model": {"rows": 4096, "tokens": 25.3}}}
    words = bulk_words({"meta": meta, "rows": rows})["bulk"]
    assert "| ≥ 1 | 1.75 (1.50–2.00) | – | met |" in words
    assert "| ≤ 1.1 | 1.20 (1.20–1.20) | – | missed |" in words
    assert "not measured: it ended with status 1" in words
    assert "1 of 2 targets met" in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--pairs", "0"], "pairs is 0"), (["--scale", "0"], "scale is 0"), (["--infinity", "nowhere"], "is not a file")],
)
def test_mistakes_are_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert words in capsys.readouterr().err
