"""Bulk classification without Ray: every row gets its answer, and no unit is computed twice."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from bulk_jobs import answers, parts
from pyarrow import parquet
from serving_models import load, text, write_adapter

from revmux import TextClassifier, UserError
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.bulk.formats.base import Range, divide_blocks
from revmux.bulk.job import list_and_prepare, prepare_job
from revmux.bulk.output import META
from revmux.bulk.score import classify_tokens
from revmux.bulk.texts import Tokenizer
from revmux.bulk.units import Unit, list_work
from revmux.bulk.worker import Finished, Worker
from revmux.data.padding import Padder
from revmux.pretrained.encoder import Encoder

pytestmark = pytest.mark.numeric


@pytest.fixture
def adapter(serving_adapters: list[Path]) -> Path:
    """Gives every input the plain model's answer, in groups of four."""
    return serving_adapters[1]


def test_every_row_gets_its_own_answer_in_the_order_of_the_input(bulk_config: BulkConfig, serving_model: Path) -> None:
    report = classify_files(bulk_config)
    assert report.is_complete
    assert report.totals.rows == 200
    found = answers(bulk_config)
    assert found["id"].tolist() == list(range(200))
    plain = load(serving_model)
    plain.backbone.freeze()
    scores = plain.backbone(plain.encode([text(index) for index in range(200)], max_length=64)).softmax(-1)
    assert found["label"].tolist() == [plain.backbone.label_names[index] for index in scores.argmax(1).tolist()]
    assert found["score"].to_numpy() == pytest.approx(scores.amax(1).numpy(), abs=1e-5)
    assert set(found["width"]) == {4}
    assert set(found["method"]) == {"token-split"}
    assert not found["fell_back"].any()
    assert found["error"].isna().all()
    assert report.totals.relative_cost < 0.9


def test_the_readers_of_parquet_folders_see_only_the_parts(bulk_config: BulkConfig) -> None:
    classify_files(bulk_config)
    assert parquet.read_table(bulk_config.output).num_rows == 200
    manifest = json.loads((Path(bulk_config.output) / META / "manifest.json").read_text())
    assert manifest["rows"] == 200
    assert [part["name"] for part in manifest["parts"]] == list(parts(bulk_config))


def test_a_retried_unit_writes_the_same_bytes_whatever_ran_before(bulk_config: BulkConfig) -> None:
    classify_files(bulk_config)
    before = parts(bulk_config)
    job, work = list_and_prepare(bulk_config)
    other = Worker(job, "cpu")
    for unit in reversed(work.units):
        other.run(unit)
    assert parts(bulk_config) == before
    assert len(before) == 4


def test_the_same_call_continues_and_computes_nothing_twice(
    bulk_config: BulkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify_files(bulk_config)
    before = parts(bulk_config)
    lost = sorted(Path(bulk_config.output).glob("part-*.parquet"))[1]
    lost.rename(f"{lost}.{'0' * 32}.tmp")  # as if its writer had been killed
    ran: list[int] = []
    original = Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, unit: (ran.append(unit.number), original(self, unit))[1])
    report = classify_files(bulk_config)
    assert ran == [1]
    assert report.resumed == 3
    assert parts(bulk_config) == before
    assert report.totals.rows == parquet.read_table(bulk_config.output).num_rows == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 8}, "system.max_length 64, but this command has 8"),
        ({"unit_rows": 100}, "unit_rows 64, but this command has 100"),
        ({"threshold": 0.5}, "system.threshold None, but this command has 0.5"),
        ({"keep_columns": ["id"]}, "columns.kept"),
    ],
)
def test_other_settings_need_another_output(bulk_config: BulkConfig, change: dict[str, Any], words: str) -> None:
    classify_files(bulk_config)
    before = parts(bulk_config)
    with pytest.raises(UserError, match="was started with") as refused:
        classify_files(replace(bulk_config, **change))
    assert words in str(refused.value)
    assert parts(bulk_config) == before


def test_changed_input_needs_another_output(bulk_config: BulkConfig) -> None:
    classify_files(bulk_config)
    pd.DataFrame({"id": range(200), "text": ["w1"] * 200}).to_parquet(bulk_config.input, row_group_size=150)
    with pytest.raises(UserError, match=r"was started with input\.sha256"):
        classify_files(bulk_config)


def test_a_failing_unit_is_left_out_after_its_attempts_and_can_be_tried_again(
    bulk_config: BulkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tries = Worker.run, []

    def poisoned(worker: Worker, unit: Unit) -> Finished:
        if unit.number == 2:
            tries.append(unit.number)
            raise RuntimeError("poison")
        return original(worker, unit)

    monkeypatch.setattr(Worker, "run", poisoned)
    report = classify_files(bulk_config)
    assert len(tries) == bulk_config.attempts == 3
    assert not report.is_complete
    (failed,) = report.failed
    assert failed.error == "RuntimeError: poison"
    assert len(parts(bulk_config)) == 3
    assert not (Path(bulk_config.output) / META / "manifest.json").exists()
    monkeypatch.setattr(Worker, "run", original)
    assert classify_files(bulk_config).is_complete
    assert answers(bulk_config)["id"].tolist() == list(range(200))


def test_fallback_thresholds_are_applied_and_counted(bulk_config: BulkConfig) -> None:
    report = classify_files(replace(bulk_config, threshold=1.0, all_scores=True))
    found = answers(bulk_config)
    assert found["fell_back"].all()
    assert set(found["stage"]) == {0}
    assert report.totals.answered_by == {"0 siso N=1": 200}
    assert report.totals.relative_cost > 1
    assert found["scores"].map(len).tolist() == [3] * 200


def test_a_ladder_runs_its_stages_and_counts_their_cost(
    bulk_config: BulkConfig, serving_model: Path, tmp_path: Path
) -> None:
    pretrained = load(serving_model)
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
    report = classify_files(replace(bulk_config, adapter=None, plan=str(tmp_path / "plan.json")))
    found = answers(bulk_config)
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
    bulk_config: BulkConfig, serving_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classify_files(replace(bulk_config, adapter=str(write_adapter(tmp_path, load(serving_model), 2, 4))))
    assert set(answers(bulk_config)["method"]) == {"siso"}
    assert "adapter token-split, N = 2, l = 4 is not used" in caplog.text


def test_reading_the_device_and_writing_overlap(bulk_config: BulkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
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
    report = classify_files(bulk_config, on_progress=lambda progress: figures.update(progress.metrics(1)))
    assert report.is_complete
    assert not together.broken
    assert 0 < figures["device_busy"] < 1


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


def test_a_used_folder_is_not_an_output(bulk_config: BulkConfig) -> None:
    Path(bulk_config.output).mkdir()
    (Path(bulk_config.output) / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="choose an empty folder"):
        classify_files(bulk_config)


def test_answers_in_bulk_are_those_of_the_classifier(
    bulk_config: BulkConfig, adapter: Path, serving_model: Path
) -> None:
    """The same groups as those that :class:`TextClassifier` forms of one unit, so the same scores."""
    classify_files(replace(bulk_config, unit_rows=200, max_batch_tokens=4096))
    classifier = TextClassifier.from_pretrained(adapter, serving_model)
    expected = classifier([text(index) for index in range(200)], top_k=1)
    found = answers(bulk_config)
    assert found["label"].tolist() == [best[0][0] for best in expected]
    assert found["score"].to_numpy() == pytest.approx([best[0][1] for best in expected], abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_that_of_the_tokenizer(side: str, serving_model: Path) -> None:
    pretrained = load(serving_model)
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


def test_the_settings_of_an_output_contain_no_password(bulk_config: BulkConfig) -> None:
    secret = replace(bulk_config, input="s3://key:secret@bucket/rows")
    settings = prepare_job(secret, list_work(bulk_config)).settings
    assert settings["input"]["source"] == "s3://key:***@bucket/rows"
    assert "secret" not in json.dumps(settings)
