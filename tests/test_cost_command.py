"""The commands that print the costs, the memory and the methods."""

import json
import sys
from dataclasses import fields

import pytest
from estimated_models import BERT
from transformers import BertConfig

from revmux.__main__ import main
from revmux.methods import method_class, method_names

pytestmark = pytest.mark.numeric


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``python -m revmux ...`` in this process: exit status, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["revmux", *arguments])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("model_type", ["vit", "unknown-architecture"])
def test_an_unsupported_architecture_is_refused_without_running_its_code(command, tmp_path, monkeypatch, model_type):
    ran = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the user would answer yes if asked to trust the code
    (tmp_path / "own.py").write_text(
        "import pathlib\nfrom transformers import PretrainedConfig\n"
        f"pathlib.Path({str(ran)!r}).touch()\nclass Own(PretrainedConfig):\n    model_type = {model_type!r}\n"
    )
    settings = {"model_type": model_type, "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for subcommand in ("cost", "memory"):
        status, _, errors = command(subcommand, "--model", str(tmp_path))
        assert status == 2
        assert f"unsupported architecture '{model_type}'; supported: bart, bert" in errors
        assert "docs/add-a-backbone.md" in errors
    assert not ran.exists()


def test_command_line_prints_speedups_and_memory(command, tmp_path):
    BertConfig(**BERT, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    model = str(tmp_path)
    status, cost, _ = command(
        "cost", "--model", model, "--num_inputs", "[2]", "--prefill_layers", "[1]", "--length", "64"
    )
    assert status == 0
    assert cost.splitlines()[-1].split()[:3] == ["2", "1", "1.50×"]
    status, memory, _ = command("memory", "--model", model, "--batch_size", "[4]", "--length", "[16]")
    assert status == 0
    assert [line.split()[2] for line in memory.splitlines()[5:7]] == ["no", "yes"]


def test_the_command_line_accepts_the_options_of_a_method(command):
    arguments = ("--num_inputs", "[2]", "--prefill_layers", "[3]", "--length", "32")
    status, _, errors = command("cost", "--model", "t5-small", "--method", "datamux", *arguments)
    assert status == 2
    assert "choose demultiplexer 'mlp'" in errors
    options = ("--options", "{demultiplexer: mlp}")
    status, cost, _ = command("cost", "--model", "t5-small", "--method", "datamux", *options, *arguments)
    assert status == 0
    assert cost.splitlines()[-1].split()[:2] == ["2", "3"]
    status, cost, _ = command("cost", "--method", "exit-head", "--options", "{layer: 3}", "--length", "128")
    assert status == 0
    n, cut_at, ceiling, counted = cost.splitlines()[-1].split()
    assert (n, cut_at, ceiling) == ("1", "3", "4.00×")
    assert float(counted.rstrip("×")) == pytest.approx(4, rel=0.02)
    status, frozen, _ = command("memory", "--model", "t5-small", "--length", "[16]", "--dtype", "float32")
    tuned = command("memory", "--model", "t5-small", "--length", "[16]", "--options", "{tune_backbone: true}")
    assert status == tuned[0] == 0
    adam = [float(text.splitlines()[5].split()[7]) for text in (frozen, tuned[1])]
    assert adam[1] > 4 * adam[0]
    assert tuned[1].splitlines()[-1] == "Servers load no adapters that tune the backbone."
    status, _, errors = command("memory", "--options", "{own_stat: mlp}")
    assert status == 2
    assert "own_state" in errors


def test_command_line_lists_every_method_with_its_options(command):
    status, listed, _ = command("methods")
    assert status == 0
    heads = [line.partition(":")[0] for line in listed.splitlines() if not line.startswith(" ")]
    assert heads == method_names()
    assert "    layer (default 1): e, the layer whose states the head reads, from 0 (embeddings) to L." in listed
    for name in method_names():
        assert all(
            f"    {option.name} (default {option.default}): " in listed for option in fields(method_class(name).Options)
        )


def test_command_line_reports_a_mistake_on_one_line(command):
    status, _, errors = command("cost", "--model", "bert-huge")
    assert status == 2
    assert errors.startswith("error: model is 'bert-huge'")
    assert len(errors.strip().splitlines()) == 1
