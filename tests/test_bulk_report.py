"""What a bulk job reports: its agreement with the plain model, its price, and the summary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bulk_jobs import parts
from serving_models import load, write_adapter

from revmux.bulk.audit import Agreement
from revmux.bulk.classify import classify_files, warn_agreement
from revmux.bulk.config import BulkConfig
from revmux.bulk.job import list_and_prepare
from revmux.bulk.output import META, OutputFolder
from revmux.bulk.progress import Progress
from revmux.bulk.summary import write_summary

pytestmark = pytest.mark.numeric


def test_the_audit_compares_a_fixed_share_of_rows_with_the_plain_model(bulk_config: BulkConfig) -> None:
    report = classify_files(replace(bulk_config, audit=0.5))
    agreement = report.totals.agreement
    assert 60 < agreement.rows < 140
    assert agreement.agreed == agreement.rows
    again = classify_files(replace(bulk_config, audit=0.5, output=bulk_config.output + "2", unit_rows=32))
    assert again.totals.agreement == agreement  # the sample depends on neither units nor groups


def test_the_audit_stops_a_job_that_falls_below_the_floor(
    bulk_config: BulkConfig, serving_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = write_adapter(tmp_path_factory.mktemp("random"), load(serving_model), 4, method="revmux")  # untrained
    bulk_config = replace(bulk_config, adapter=str(other), audit=1.0, audit_floor=0.9, unit_rows=16)
    report = classify_files(bulk_config)
    assert report.stopped
    assert not report.is_complete
    assert report.totals.rows < 200
    assert report.totals.agreement.is_below(0.9)
    assert "agreement with the plain model is" in (warn_agreement(report.totals.agreement, 0.99) or "")
    assert not (Path(bulk_config.output) / META / "manifest.json").exists()


def test_a_job_has_the_price_of_the_time_of_all_its_starts(bulk_config: BulkConfig) -> None:
    bulk_config = replace(bulk_config, price=3600.0, audit=0.5)  # 1 per second
    first = classify_files(bulk_config)
    assert first.price is not None
    output = OutputFolder(bulk_config.output)
    assert first.price.so_far == pytest.approx(output.worker_seconds())
    assert first.price.per_million == pytest.approx(1e6 / 200 * first.price.so_far)
    # The plain model has no audit, so its price is compared with all that ran.
    totals = first.totals
    assert totals.cost + totals.audit_cost > totals.cost + 0.3 * 200
    assert first.price.plain == pytest.approx(first.price.so_far * 200 / (totals.cost + totals.audit_cost))
    assert classify_files(bulk_config).price == first.price  # nothing ran
    (Path(bulk_config.output) / list(parts(bulk_config))[1]).unlink()
    lines: list[str] = []
    second = classify_files(bulk_config, on_progress=lambda progress: lines.append(progress.line(1)))
    assert second.price is not None
    assert second.price.so_far > first.price.so_far
    assert f"price {second.price.so_far:,.2f}, {second.price.per_million:,.2f} per million rows" in lines[-1]
    job, _ = list_and_prepare(bulk_config)
    write_summary(output, second, job)
    page = (Path(bulk_config.output) / META / "summary.html").read_text()
    assert f"by counted cost</td><td>{second.price.plain:,.2f}</td>" in page
    assert classify_files(replace(bulk_config, price=None)).price is None


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


def test_the_summary_escapes_texts_and_shows_bad_rows(bulk_config: BulkConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "<script>alert(1)</script> $x$"}\n{"text": ""}\n')
    bulk_config = replace(bulk_config, input=str(tmp_path / "rows.jsonl"), audit=1.0)
    job, _ = list_and_prepare(bulk_config)
    report = classify_files(bulk_config)
    write_summary(OutputFolder(bulk_config.output), report, job)
    page = (Path(bulk_config.output) / META / "summary.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x$" in page
    assert "the text is empty" in page
    assert "100.00% of 1 audited rows" in page
    assert (Path(bulk_config.output) / META / "summary.png").read_bytes().startswith(b"\x89PNG")
