"""Recipes of tiny language models with a prompt."""

from __future__ import annotations

from pathlib import Path

from ray_jobs.training.launch import load_checked
from revmux.data.config import DataConfig
from revmux.data.prompt import Prompt
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import Prepared, prepare

PROMPT = Prompt("mine", "Text: {text}\nIs it bad or good?\nAnswer:", {"bad": ("bad",), "good": ("good",)})
FAMILIES = ("llama", "t5")
TEXTS = ["w1 w5 w7", "w2", "w3 w4 w9 w9 w12 w13"]


def backbone(folder: Path, prompt: Prompt | str | None = PROMPT, max_length: int = 24) -> BackboneConfig:
    return BackboneConfig(str(folder), max_length=max_length, prompt=prompt)


def recipe(folder: Path, source: Path, store: Path, **changes: object) -> Recipe:
    settings = {
        "backbone": backbone(folder),
        "data": DataConfig(source=str(source)),
        "method": MethodConfig("revmux", 2, 1),
        "optim": OptimConfig(epochs=1, batch_size=16, learning_rate=1e-3),
        "store": StoreConfig(root=str(store), dtype="float32"),
        "shuffles": 1,
    }
    return Recipe(**{**settings, **changes})  # type: ignore[arg-type]


def prepared(running: Recipe) -> Prepared:
    return prepare(running, load_checked([running], workers=1))
