"""Random adapters on one base, written by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.tasks.settings import Settings
from revmux.pretrained.identity import resolve

CLASSES = 3
_MAPS = ["query", "key", "value", "dense"]
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_adapters(settings: Settings, folder: Path, count: int) -> list[Path]:
    """Write adapters that differ in all of their weights; return their folders.

    Args:
        settings: the base, which is a BERT, and the rank and depth of LoRA.
        folder: their parent.
        count: number of adapters.
    """
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve(settings.base), num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    layers = list(range(settings.frozen_layers, base.config.num_hidden_layers))
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=_MAPS,
        layers_to_transform=layers,
        layers_pattern="layer",
    )
    tuned = get_peft_model(base, lora)
    for adapter in tuned.peft_config.values():
        adapter.base_model_name_or_path = settings.base
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    folders = [folder / f"{number}" for number in range(count)]
    for path in folders:
        with torch.no_grad():
            for parameter in trained:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(str(path))
    return folders


def file_bytes(folder: Path) -> int:
    """Return the size of the configuration and the weights of an adapter."""
    return sum((folder / name).stat().st_size for name in _FILES)


def describe(folder: Path) -> dict[str, object]:
    """Return what an adapter changes."""
    settings = json.loads((folder / _FILES[0]).read_text())
    return {name: settings[name] for name in ("peft_type", "r", "target_modules", "layers_to_transform")}
