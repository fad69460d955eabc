"""Adapters as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def write_peft(
    folder: Path, base: Path, seed: int = 0, classes: int = 3, layers: list[int] | None = None, **settings: Any
) -> tuple[Path, Callable[[list[str]], Tensor]]:
    """Write an adapter as PEFT saves it.

    Returns:
        The folder, and PEFT's own scores of texts.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=classes, ignore_mismatched_sizes=True, pad_token_id=tokenizer.pad_token_id
    )
    targets = TARGETS[model.config.model_type]
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=targets, layers_to_transform=layers)
    tuned = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    edit_settings(folder, **settings)

    @torch.no_grad()
    def scores(texts: list[str]) -> Tensor:
        return tuned(**tokenizer(texts, padding=True, return_tensors="pt")).logits

    return folder, scores


def edit_settings(folder: Path, **settings: Any) -> None:
    """Change settings of a saved adapter."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
