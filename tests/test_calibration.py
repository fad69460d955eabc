"""A bias per label word corrects a model's preference for one of the words, and belongs to the prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numeric import approx
from tiny_models import LABELS, write_language_model

from revmux import BackboneConfig, UserError, load_pretrained
from revmux.__main__ import main
from revmux.backbone import Verbalizer
from revmux.data.prompt import Prompt, load_prompt
from revmux.pretrained.calibration import fit_bias

pytestmark = pytest.mark.numeric

TEMPLATE = 'template: "Text: {text} Answer:"\n'


def test_the_bias_undoes_a_preference_for_one_class() -> None:
    torch.manual_seed(0)
    labels = torch.arange(600) % 3
    scores = 2.0 * torch.nn.functional.one_hot(labels, 3) + torch.randn(600, 3)
    shifted = scores + torch.tensor([0.0, 4.0, 0.0])
    bias = torch.tensor(fit_bias(shifted, labels))
    assert float(bias.sum()) == pytest.approx(0, abs=1e-3)
    assert (bias - torch.tensor(fit_bias(scores, labels))).tolist() == pytest.approx([4 / 3, -8 / 3, 4 / 3], abs=1e-3)
    assert float((shifted.argmax(1) == labels).float().mean()) < 0.5
    assert float(((shifted + bias).argmax(1) == labels).float().mean()) > 0.8


def test_the_bias_of_a_model_whose_scores_are_too_flat_separates_the_classes() -> None:
    torch.manual_seed(0)
    labels = (torch.arange(2000) % 10 < 7).long()  # 70% of the inputs are of class 1
    steep = torch.stack([torch.zeros(2000), 8.0 * labels - 4 + 2 * torch.randn(2000)], dim=1)
    flat = 0.1 * steep + torch.tensor([0.0, 1.0])
    bias = torch.tensor(fit_bias(flat, labels))
    assert float(((flat + bias).argmax(1) == labels).float().mean()) > 0.97
    assert (bias[0] - bias[1]).item() == pytest.approx(1.0, abs=0.1)


def test_the_bias_of_scores_that_say_nothing_is_that_of_the_frequencies() -> None:
    torch.manual_seed(0)
    labels = (torch.arange(1000) % 10 < 8).long()
    bias = fit_bias(1e-4 * torch.randn(1000, 2), labels)
    assert bias[1] - bias[0] == pytest.approx(1.386, abs=1e-2)  # log(0.8 / 0.2)


def test_a_calibrated_prompt_is_a_file_that_a_model_is_loaded_with(
    tmp_path: Path, tiny_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, first, second = write_language_model(tmp_path / "llama", "llama"), tmp_path / "a.yaml", tmp_path / "b.yaml"
    words = "\n".join(f"  {label}: [w{index + 1}]" for index, label in enumerate(LABELS))
    first.write_text(f"{TEMPLATE}labels:\n{words}\n")
    arguments = ["--data.source", str(tiny_csv), "--data.selection_share", "0.5", "--max_length", "24"]
    assert main([str(model), str(first), str(second), *arguments], "revmux calibrate") == 0
    assert "accuracy on 32 inputs of the selection set" in capsys.readouterr().out
    prompt = load_prompt(str(second))
    assert list(prompt.bias) == list(prompt.labels)
    assert Prompt.from_dict(prompt.to_dict()) == prompt
    assert prompt != load_prompt(str(first)), "an adapter is refused on the model without the bias"
    plain, calibrated = (
        load_pretrained(BackboneConfig(str(model), max_length=24, prompt=str(file))) for file in (first, second)
    )
    tokens = plain.encode(["w3 w4 w5", "w6"])
    with torch.no_grad():
        difference = calibrated.backbone(tokens) - plain.backbone(tokens)
    assert difference[0].tolist() == approx([prompt.bias[label] for label in prompt.labels])
    assert main([str(model), str(first), str(tmp_path / "b.txt"), *arguments], "revmux calibrate") == 2
    assert "name a .yaml file" in capsys.readouterr().err


def test_a_wrong_bias_is_refused(tmp_path: Path) -> None:
    prompt = Prompt("mine", "{text}", {"a": ("x",), "b": ("y",)})
    with pytest.raises(UserError, match="unknown class 'c'"):
        replace(prompt, bias={"c": 1.0})
    file = tmp_path / "mine.yaml"
    file.write_text(f"{TEMPLATE}labels: {{a: [x], b: [y]}}\nbias: {{a: much}}\n")
    with pytest.raises(
        UserError, match=r"bias of prompt mine.yaml is .*; write one number per class|write one number per class"
    ):
        load_prompt(str(file))
    with pytest.raises(UserError, match="2 classes but 1 biases"):
        Verbalizer(("a", "b"), ((1,), (2,)), bias=(0.5,))
