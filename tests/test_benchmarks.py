"""The baselines of the benchmarks compute what they claim, and the pages show the right rows."""

import json
from pathlib import Path

import pytest
from numeric import assert_close
from tiny_methods import groups_of, randomised, texts, tiny_bert

from benchmarks.long_tests import Recorder, long_tests_words
from benchmarks.systems.grid import SYSTEMS
from benchmarks.systems.page import PUBLISHED, systems_words
from benchmarks.trained import Run, siso_row
from benchmarks.training.released import ReleasedModel
from revmux import MultiplexedClassifier
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import MethodConfig, OptimConfig, Recipe

pytestmark = pytest.mark.numeric


def test_the_released_step_gives_the_same_answers_and_adapter_gradients_as_our_step():
    tokens, groups = texts(4), groups_of(2)
    ours, released = (
        model(backbone, randomised(backbone, "revmux", 2, {}), 1)
        for model, backbone in ((MultiplexedClassifier, tiny_bert()), (ReleasedModel, tiny_bert()))
    )
    released.backbone.requires_grad_(True)
    for model in (ours, released):
        output = model.run_groups(model.prefill(tokens), groups)
        model.answered = output.scores.detach()
        output.scores.square().sum().backward()
    assert_close(released.answered, ours.answered)
    for (name, one), other in zip(ours.method.named_parameters(), released.method.parameters(), strict=True):
        assert_close(other.grad, one.grad, message=name)
    assert ours.backbone.layer(0).attention.self.query.weight.grad is None
    assert released.backbone.layer(
        0
    ).attention.self.query.weight.grad.any()  # the gradients that the released code computes in vain


def test_every_published_row_has_a_system():
    rows = json.loads(PUBLISHED.read_text())["rows"]
    titles = {system.title: system.widths for system in SYSTEMS} | {"SISO": (1,)}
    assert all(row["num_inputs"] in titles[row["title"]] for row in rows)


def test_the_page_shows_published_figures_beside_ours():
    place = {"family": "bert", "backbone": "small", "task": "toy", "cost_counted": 0.75, "prefill_layers": 3}
    trained = {"title": "RevMUX", "method": "revmux", "num_inputs": 2, "seeds": 3, "tunable_params": 9}
    trained |= {"accuracy_mean": 0.5, "accuracy_std": 0.01, "throughput_ratio": 1.25}
    counted = {"title": "RevMUX", "num_inputs": 2, "tunable_params": 9_445_248, "accuracy_mean": None, "why": "counted"}
    rows = [siso_row(0.6), place | trained, place | counted | {"backbone": "bert-base", "method": "revmux"}]
    meta = {"budget": {"epochs": 3, "tuned_epochs": 2, "exit_head_epochs": 9, "batch_size": 16, "shuffles": 4}}
    meta |= {
        "data": {"train": 1, "test": 1},
        "machine": {"cores": 2, "threads": 1},
        "versions": {"torch": "2"},
        "commit": "abc",
    }
    words = systems_words({"meta": meta, "rows": rows})
    assert "| RevMUX | 2 | 3 | 9 | 0.75 | 1.25× | 50.0 ± 1.0 | 10.0 | 81.22 | 1.96 |" in words["systems-task"]
    assert "| bert-base | RevMUX | 2 | 3 | 9,445,248 | 0.750 | 81.22 |" in words["systems-shapes"]


def test_a_kept_result_is_reused_only_for_the_same_settings(tiny_csv, tiny_model_folder, tmp_path):
    data = DataConfig(source=str(tiny_csv))
    task = load_task(data)

    def run(epochs: int) -> Run:
        backbone = BackboneConfig(str(tiny_model_folder), max_length=16)
        recipe = Recipe(backbone, data, MethodConfig("revmux", 2, 1), OptimConfig(epochs))
        return Run.named("RevMUX", recipe, task, tmp_path)

    assert run(3).result == run(4).result
    run(3).result.write_text(json.dumps({"asked": run(3).asked}))
    assert run(3).is_done
    assert not run(4).is_done


def test_the_record_of_the_long_tests_has_a_row_per_file_and_keeps_those_that_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.long_tests.RESULT", tmp_path / "long-tests.json")
    other = Recorder("earlier", 2)
    other.expected["tests/c.py"] = 1
    other.write("tests/c.py")
    recorder = Recorder("commit", 2)
    recorder.pytest_xdist_node_collection_finished(
        None, ["tests/a.py::x", "tests/a.py::y[1]@a", "tests/b.py::z", "tests/d.py::w", "tests/d.py::v"]
    )
    for test, outcome in (
        ("a.py::x", "passed"),
        ("b.py::z", "failed"),
        ("a.py::y[1]@a", "passed"),
        ("d.py::w", "passed"),
    ):
        for when in ("setup", "call", "teardown"):
            result = outcome if when == "call" else "passed"
            recorder.pytest_runtest_logreport(
                pytest.TestReport(f"tests/{test}", (), {}, result, None, when, duration=1.0)
            )
        assert Recorder("commit", 2).passed == (["tests/a.py"] if test > "a.py::y" and test != "b.py::z" else [])
    recorder.pytest_sessionfinish()
    rows = json.loads((tmp_path / "long-tests.json").read_text())["rows"]
    assert [(row["tests"], row["seconds"], row["result"], row["commit"]) for row in rows] == [
        (2, 6, "passed", "commit"),
        (1, 3, "1 failed", "commit"),
        (1, 0, "1 not ended", "earlier"),
        (2, 3, "1 not ended", "commit"),
    ]
    meta = {"data": {"workers": 2}, "machine": {"cores": 2}, "date": "2026-01-02T03"}
    table = long_tests_words({"meta": meta, "rows": rows})["long-tests"]
    assert "| `tests/b.py` | 1 | 3 | 1 failed | `commit` |" in table
