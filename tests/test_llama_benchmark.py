"""The pages of the benchmarks on LLaMAs: which prompt was chosen, what the prefix saves, and what a ladder takes in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from test_backbone_seq2seq_decoder import backbone_of
from test_prompts import byte_tokenizer
from tiny_models import tiny_config

from benchmarks import size
from benchmarks.llama import prefix
from benchmarks.llama.page import llama_words
from revmux.backbone.decoder import DecoderBackbone
from revmux.data.tokens import TokenizedSplit

META = {"machine": {"cores": 2}, "versions": {"torch": "2"}, "commit": "abcdef0123"}


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
