"""The pages of the benchmarks on LLaMAs: which prompt was chosen, what the prefix saves, and what a ladder takes in memory."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from generative_models import backbone_of
from test_prompts import byte_tokenizer
from tiny_models import WORDS, tiny_config
from transformers import LlamaForCausalLM

from benchmarks import size
from benchmarks.llama import __main__ as llama
from benchmarks.llama import ladders, measure, prefix, tasks
from benchmarks.llama.answers import answer_words
from benchmarks.llama.page import llama_words
from revmux.backbone.decoder import DecoderBackbone
from revmux.data.tokens import TokenizedSplit
from revmux.plan.config import MeasureConfig

META = {
    "machine": {"cores": 2},
    "versions": {"torch": "2"},
    "commits": dict.fromkeys(("prompts", "prefix"), "abcdef0123"),
}


def prompt_row(prompt: str, selection: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": "prompt",
        "task": "SST-2",
        "prompt": prompt,
        "dtype": "bfloat16",
        "constant_tokens": 3,
    }
    row |= {"selection": 0.4, "selection_calibrated": selection, "selection_inputs": 300}
    return row | {"dev": 0.5, "dev_calibrated": 0.55, "dev_inputs": 872, "dev_majority": 0.51}


def test_the_page_marks_the_prompt_that_the_selection_set_chooses() -> None:
    words = llama_words({"meta": META, "rows": [prompt_row("sst2", 0.7), prompt_row("sst2-chat", 0.6)]})
    lines = words["llama-prompts"].splitlines()
    assert "| **`sst2`** | 40.0% / 70.0% | 50.0% | 55.0% | 51.0% | 3 |" in lines[2]
    assert "| `sst2-chat` |" in lines[3]
    assert "SST-2 300 and 872" in lines[-1]


def test_the_prefix_is_timed_with_and_without_on_the_same_model(monkeypatch: Any) -> None:
    backbone, tokenizer = backbone_of("llama-words"), byte_tokenizer()
    assert isinstance(backbone, DecoderBackbone)
    backbone.keep_prefix((5, 6, 7))
    backbone.freeze()
    monkeypatch.setattr(prefix, "CUT", 1)
    split = TokenizedSplit(Dataset.from_dict({"text": ["yes no"] * 8, "label": [0, 1] * 4}), tokenizer, 16)
    ids = torch.randint(8, 50, (8, 8))
    ids[:, :3] = torch.tensor([5, 6, 7])
    monkeypatch.setattr(
        prefix, "like_length_batches", lambda *_: [{"input_ids": ids, "attention_mask": ids.ne(0).long()}]
    )
    split.lengths = torch.full((8,), 8)
    rows = prefix.measure_prefix(backbone, split, 1)
    assert [row["num_inputs"] for row in rows] == [1, 2, 4]
    assert all(0.2 < row["saved_counted"] < 3 / 8 + 0.05 for row in rows)
    table = llama_words({"meta": META, "rows": [prompt_row("sst2", 0.7), *(row | {"prompt": "mine"} for row in rows)]})
    assert "3 of 8 tokens (mean) are constant" in table["llama-prefix"]


def test_the_table_of_sizes_has_training_and_serving_with_and_without_a_copy_for_lora(tmp_path: Path) -> None:
    config = tiny_config("llama", num_hidden_layers=8, max_position_embeddings=256)
    config.save_pretrained(tmp_path)
    rows = size.measure(str(tmp_path))
    training, serving = rows[:4], rows[4:]
    assert [row["title"].partition(",")[0] for row in training] == ["training exit head"] * 2 + ["training revmux"] * 2
    for whole, checkpointed in zip(training[::2], training[1::2]):
        assert checkpointed["activations"] <= whole["activations"]
        assert checkpointed["optimizer"] == whole["optimizer"] == 2 * whole["gradients"]
    assert training[3]["activations"] < training[2]["activations"], "several layers are kept"
    apart, merged = serving
    assert apart["merged"] == 0 < merged["merged"]
    layer = merged["merged"] // 5  # the exit head adapts layer 2, RevMUX layers 5 to 8
    assert (
        2 * sum(config.hidden_size * width for width in (4 * [config.hidden_size] + 3 * [config.intermediate_size]))
        == layer
    )
    assert merged["total"] - apart["total"] == merged["merged"]
    data = {"rank": 16, "length": 128, "constant_tokens": 40, "batch_size": 32, "max_batch": 128}
    words = size.size_words({"meta": {"data": data}, "rows": rows})["size"].splitlines()
    assert len([line for line in words if line.startswith(f"| {tmp_path} |")]) == 6
    assert all(line.endswith("| 24 GB |") for line in words[2:8])


def write_glue(folder: Path, rows: int) -> None:
    """Sentences of random words in the layout of SST-2, whose label is in the text."""
    chance = random.Random(0)
    folder.mkdir(parents=True)
    for split, count in (("train", rows), ("dev", 20)):
        lines = ["sentence\tlabel"]
        for number in range(count):
            words = chance.sample(WORDS, 6)
            lines.append(f"{' '.join(words)} {'positive' if number % 2 else 'negative'}\t{number % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


@pytest.mark.long
def test_systems_are_measured_row_by_row_on_a_tiny_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 30, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    LlamaForCausalLM(tiny_config("llama", **sizes, initializer_range=0.2)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    write_glue(tmp_path / "glue/SST-2", 300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "TIMING", MeasureConfig(throughput_inputs=8, throughput_batch=8, throughput_pairs=1))
    settings = ["--glue", str(tmp_path / "glue"), "--parts", "systems", "--tasks", "SST-2", "--limit", "32"]
    settings += ["--model", str(model)]
    short = replace(tasks.TASKS["SST-2"], prompt="sst2")  # the tokens of this model are bytes
    monkeypatch.setitem(tasks.TASKS, "SST-2", short)
    settings += ["--teacher", "tuned", "--dtype", "float32"]
    monkeypatch.setattr(ladders, "COSTS", (0.9,))
    chosen = ["RevMUX l=15 N=2", "Skip-only, layer 15", "soft prompt", "tuned head", "ladder"]
    llama.main([*settings, "--systems", *chosen])

    result = json.loads((tmp_path / "runs/llama/limit-32.json").read_text())
    rows = {(row["title"], row["num_inputs"]): row for row in result["rows"] if row["kind"] != "ladders"}
    done = {key for key, row in rows.items() if row["accuracy_mean"] is not None}
    untrained = {("SISO, zero-shot", 1), ("SISO, calibrated", 1), ("SISO, layers above 15 tuned", 1)}
    trained = {("SISO, tuned head", 1), ("SISO, soft prompt", 1), ("Skip-only, layer 15", 1), ("RevMUX l=15", 2)}
    assert done == untrained | trained
    assert all(row["why"] for key, row in rows.items() if key not in done)
    assert 0.7 < rows["RevMUX l=15", 2]["cost_counted"] < 0.85
    assert rows["SISO, layers above 15 tuned", 1]["siso_agreement"] == 1.0
    assert rows["RevMUX l=15", 2]["siso_accuracy"] == rows["SISO, layers above 15 tuned", 1]["accuracy_mean"]
    measured = [row for row in result["rows"] if row["kind"] == "ladders" and row["accuracy_mean"] is not None]
    assert [row["systems"] for row in measured] == ["all systems", "early exits alone"]
    assert all(row["cost_counted"] > 0.4 for row in measured)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a kept row is measured again")

    for name in ("measure_run", "measure_labelled", "untrained_rows"):
        monkeypatch.setattr(measure, name, refuse)
    monkeypatch.setattr(tasks, "fit_bias", refuse)
    llama.main([*settings, "--systems", *chosen])
    again = json.loads((tmp_path / "runs/llama/limit-32.json").read_text())
    assert again["rows"] == result["rows"]
    words = llama_words(result)
    assert "| RevMUX l=15 | 2 |" in words["llama-systems"]
    assert "| 94.38 |" in words["llama-systems"]
    assert "systems have not run yet" in words["llama-systems"]
    assert "all systems" in words["llama-ladders"]


def test_a_row_without_figures_replaces_none_that_has_some_and_settings_are_not_mixed(tmp_path: Path) -> None:
    def row(title: str, prompt: str, accuracy: float | None, task: str = "toy") -> dict[str, Any]:
        place = {
            "kind": "systems",
            "task": task,
            "title": title,
            "num_inputs": 2,
            "prompt": prompt,
            "dtype": "bfloat16",
        }
        return place | {"accuracy_mean": accuracy} | ({} if accuracy is not None else {"why": "not run yet"})

    result, settings = tmp_path / "result.json", argparse.Namespace(model="llama")

    def write(*rows: dict[str, Any]) -> list[tuple[str, str, str, float | None]]:
        llama._write(result, settings, list(rows), {})
        written = json.loads(result.read_text())["rows"]
        return [(one["task"], one["title"], one["prompt"], one["accuracy_mean"]) for one in written]

    write(row("a", "old", 0.5), row("b", "old", 0.6), row("c", "old", None), row("a", "old", 0.7, "other"))
    assert write(row("a", "old", None), row("c", "old", 0.8)) == [
        ("toy", "a", "old", 0.5),
        ("toy", "b", "old", 0.6),
        ("toy", "c", "old", 0.8),
        ("other", "a", "old", 0.7),
    ]
    assert write(row("a", "new", 0.9), row("b", "new", None)) == [
        ("other", "a", "old", 0.7),
        ("toy", "a", "new", 0.9),
        ("toy", "b", "new", None),
    ]


def test_prompts_and_prefix_have_the_commit_of_their_last_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, settings = tmp_path / "result.json", argparse.Namespace(model="llama")
    prefix = {"kind": "prefix", "title": "a", "ratio_median": 1.0}
    for commit, part in (("first", "prompts"), ("second", "prefix"), ("third", None)):
        monkeypatch.setattr(llama, "describe_run", lambda *_, commit=commit: {"commit": commit, "data": {}})
        llama._write(result, settings, [prefix], {}, part)
    commits = json.loads(result.read_text())["meta"]["commits"]
    assert commits == {"prompts": "first", "prefix": "second"}


def test_the_answers_compare_a_shared_pass_with_the_best_exit_of_at_most_its_cost() -> None:
    def row(title: str, method: str, cost: float, accuracy: float, width: int = 1, layer: int = 15) -> dict[str, Any]:
        figures = {"accuracy_mean": accuracy, "siso_agreement": 1 - accuracy, "cost_counted": cost}
        return figures | {
            "task": "toy",
            "title": title,
            "method": method,
            "recipe": "strong",
            "num_inputs": width,
            "prefill_layers": layer,
        }

    rows = [
        row("RevMUX l=15", "revmux", 0.76, 0.86, 2),
        row("RevMUX l=15", "revmux", 0.57, 0.80, 8),
        row("RevMUX l=15, without the own-state correction", "revmux", 0.76, 0.85, 2),
        row("Skip-only, layer 15", "skip-only", 0.5, 0.82),
        row("Exit head, layer 20", "exit-head", 0.67, 0.84, layer=20),
        row("Exit head, layer 25", "exit-head", 0.83, 0.99, layer=25),
    ]
    words = answer_words(rows)
    accuracy, agreement = words.split("toy, agreement with the teacher: ")
    assert "in 2 of 3 cases, at costs of 0.76" in accuracy
    assert "| RevMUX l=15 | 2 | 0.76 | 86.0 | Exit head, layer 20 | 0.67 | 84.0 | +2.0 |" in accuracy
    assert "| RevMUX l=15 | 8 | 0.57 | 80.0 | Skip-only, layer 15 | 0.50 | 82.0 | -2.0 |" in accuracy
    assert "in 1 of 3 cases, at costs of 0.57" in agreement
    assert "| RevMUX l=15 | 2 | 0.76 | 14.0 | Skip-only, layer 15 | 0.50 | 18.0 | -4.0 |" in agreement
    assert "| RevMUX l=15 | 2 | 86.0 | 82.0 | +4.0 | 85.0 | +1.0 |" in words
